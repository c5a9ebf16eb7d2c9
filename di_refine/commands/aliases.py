"""Spellings of neighbouring projects, which are taken where they mean the same: docs/coming-from.md lists them.

Underscores in names count as hyphens (`--sigma_min`), and switches take the values that those projects give them
(`--mirror=1`). An option that means something else elsewhere, or nothing here, is refused with what to give instead.
"""

from collections.abc import Collection, Sequence

from di_refine.errors import InputError

SAME = {
    "--trunc": ("--truncation",),
    "--edm-model": ("--teacher",),
    "--freezed": ("--freeze-d",),
    "--augpipe": ("--augment",),
    "--glr": ("--lr",),
    "--dlr": ("--d-lr",),
    "--map-depth": ("--mapping-layers",),
    "--cbase": ("--channel-base", "--width"),
    "--cmax": ("--channel-max",),
    "--cres": ("--channel-mult",),
    "--xflip": ("--mirror",),
    "--transfer": ("--start-from",),
    "--num-steps": ("--steps",),
}
"""Another project's name -> ours, the first that a command has."""

WITHOUT_MEANING = ("--verbose", "--nobench", "--bench", "--allow-tf32", "--nhwc")
"""What changes nothing that anybody would see here."""

OTHERWISE = {
    "--gpus": "several GPUs are asked for by torchrun --nproc_per_node=N",
    "--duration": "give --kimg, thousands of images instead of millions",
    "--ema": "give --ema-kimg, the half-life in thousands of images instead of millions",
    "--cfg": "sizes and rates are fitted to the data (--preset=auto); docs/presets.md has the table",
    "--arch": "this trains DDPM++ networks; --width, --channel-mult and --num-blocks set their sizes",
    "--precond": "this trains networks with EDM's preconditioning",
    "--aug": "augmentation is adaptive; --augment=none turns it off, and --target sets its aim",
    "--subset": "dataset_tool.py --max-images makes a smaller data set",
    "--ls": "the loss is scaled by nothing here; leave it out",
    "--fp16": "give --precision, or --fp16-res for a GAN",
    "--fp32": "float32 is the default; leave it out",
    "--dump": "training states are written at every tick; leave it out",
}
"""What is refused, with what to do, in commands that train; `--gpus` in all. Options of a command's own go before."""

YES, NO = ("1", "true", "yes"), ("0", "false", "no")


def ours(words: Sequence[str], options: Collection[str], flags: Collection[str]) -> list[str]:
    """The words of a command line in this project's spelling.

    Args:
        words: as given.
        options: the names of the command's options.
        flags: those of them that are switches.

    Raises:
        InputError: an option that means something else, or nothing, here.
    """
    found: list[str] = []
    size = None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*found, word, *rest]
        if not word.startswith("--"):
            found.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name not in options:
            name = next((known for known in SAME.get(name, ()) if known in options), name)
        if name in ("--width", "--height") and name not in options and "--resolution" in options:
            value = value if equals else rest.pop(0) if rest else ""
            if size not in (None, value):
                raise InputError(
                    f"--width={size} and --height={value} differ, and images are square: give --resolution"
                )
            name, equals, size = "--resolution", "=", value
        is_flag = name in flags or name in WITHOUT_MEANING
        if (is_flag or name == "--gpus") and not equals and rest and rest[0].lower() in (*YES, *NO):
            value, equals = rest.pop(0), "="
        if name in options:
            if name in flags and value.lower() in (*YES, *NO):
                found.append(name if value.lower() in YES else f"--no-{name[2:]}")
            else:
                found.append(f"{name}{equals}{value}")
                if not equals and name not in flags and rest:
                    found.append(rest.pop(0))  # its value, whatever it looks like
        elif name == "--gpus" and value == "1":
            continue
        elif name == "--gpus" or (name in OTHERWISE and "--kimg" in options):
            raise InputError(f"{word}: {OTHERWISE[name]}")
        elif name not in WITHOUT_MEANING:
            found.append(word)
    return found
