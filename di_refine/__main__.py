"""`python -m di_refine TOOL`: the tools beside the commands of the repository's root."""

import sys

from di_refine import start

TOOLS = {
    "doctor": "Say what is installed here, what this machine has, and what would help.",
    "inspect": "Say what a network file holds.",
    "convert": "Convert a network file to a pickle, to safetensors or to ONNX.",
    "zoo": "List, fetch and verify the public networks and data that the registry names.",
    "report": "Write the page of a run, or one that compares several.",
    "view": "Compare networks live, on a local page.",
    "playground": "Train an objective in the plane, where its result can be computed.",
    "sample-teacher": "Draw a data set from a diffusion model.",
    "refine": "Refine a StyleGAN2 generator with a diffusion teacher.",
    "distill": "Distil a diffusion model into a generator of one step or a few.",
    "pretrain": "Train a diffusion teacher, a GAN or a feature network.",
    "generate": "Draw images from a network.",
    "calc-metrics": "Measure networks, folders and data sets.",
    "dataset-tool": "Convert images into a data set.",
}


def main() -> None:
    """Run the tool that the first argument names, with the arguments after it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("Usage: python -m di_refine TOOL [OPTIONS]\n\nTools, whose options TOOL --help lists:")
        for tool, what in TOOLS.items():
            print(f"  {tool:16}{what}")
        return
    if name not in TOOLS:
        print(f"error: there is no tool {name!r}; python -m di_refine --help lists them", file=sys.stderr)
        sys.exit(2)
    # Only the tool that is asked for is imported: the others would bring PyTorch along.
    start.run(name.replace("-", "_"), sys.argv[2:], f"python -m di_refine {name}")


if __name__ == "__main__":
    main()
