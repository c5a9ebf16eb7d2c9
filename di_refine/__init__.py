"""Refine and distil image generators with a pre-trained diffusion model (Diff-Instruct, arXiv 2305.18455)."""
