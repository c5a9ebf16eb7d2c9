"""Hyper-parameters that were published for a method, by the names of the options.

They are for CIFAR-10 and networks of its size. Where the authors trained another setting than ours (other data, losses
beside the objective), the preset is their objective under the settings of the method that it builds on, and says so.
"""

from typing import Any

_DIFF_INSTRUCT = {  # arXiv 2305.18455, section 4.1 and appendix
    "objective": "ikl",
    "init_sigma": 1.0,
    "sigma_dist": "lognormal",
    "lr": 1e-5,
    "score_lr": 1e-5,
    "beta1": 0.0,
    "batch": 128,
    "ema_kimg": 500,
}
_SID = {  # arXiv 2404.04057, section 5 and appendix
    **_DIFF_INSTRUCT,
    "objective": "sid",
    "alpha": 1.2,
    "normalize": True,
    "init_sigma": 2.5,
    "sigma_dist": "edm-grid",
    "tmax": 800.0,
    "batch": 256,
}
_UNI = {name: value for name, value in _SID.items() if name != "alpha"}

PRESETS: dict[str, dict[str, Any]] = {
    "diff-instruct": _DIFF_INSTRUCT,
    "dmd": {**_DIFF_INSTRUCT, "objective": "dmd"},  # DMD's gradient; its regression loss needs pairs and is not there
    "f-distill-js": {**_DIFF_INSTRUCT, "objective": "f-js"},  # without f-distill's GAN loss: see --adversarial-weight
    "f-distill-fkl": {**_DIFF_INSTRUCT, "objective": "f-fkl"},
    "sid": _SID,
    "sim": {**_UNI, "objective": "sim"},  # SIM under SiD's settings
    "uni-rkl": {**_UNI, "objective": "uni-rkl"},  # Uni-Instruct builds on SiD's settings (arXiv 2505.20755)
    "uni-fkl": {**_UNI, "objective": "uni-fkl"},
    "uni-js": {**_UNI, "objective": "uni-js"},
}


def preset(name: str, objective: str | None = None) -> dict[str, Any]:
    """The values of a preset; for another objective than its own, without those that belong to that one."""
    values = PRESETS[name]
    if objective in (None, values["objective"]):
        return values
    return {key: value for key, value in values.items() if key not in ("objective", "alpha", "normalize")}
