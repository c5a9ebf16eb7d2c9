"""Make a folder of pictures, one sub-folder per class, from the npm package emoji-datasource-google."""

import argparse
import json
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

PER_CLASS = 128  # what the smallest classes have


def chosen(emoji: list[dict], per_class: int = PER_CLASS) -> dict[str, list[str]]:
    """Choose equally many pictures for each class.

    Classes are the Unicode categories, with people who do sports counted among the activities; skin tones themselves
    ("Component") are left out, and so are pictures that differ from another by the skin tone alone. From a larger
    class every so manieth picture is taken in Unicode's order, in which variants of one emoji are neighbours.

    Args:
        emoji: the entries of the package's emoji.json.
        per_class: how many pictures to take; a class that has fewer is an error.

    Returns:
        Class -> file names of its pictures.

    Raises:
        ValueError: a class has too few pictures.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for entry in sorted(emoji, key=lambda entry: entry["sort_order"]):
        if entry["has_img_google"] and entry["category"] != "Component":
            sports = entry["subcategory"] == "person-sport"
            found["Activities" if sports else entry["category"]].append(entry["image"])
    for name, images in found.items():
        if len(images) < per_class:
            raise ValueError(f"{name} has {len(images)} pictures, fewer than {per_class}")
    return {
        name: [images[i * len(images) // per_class] for i in range(per_class)] for name, images in sorted(found.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="emoji-datasource-google-16.0.0.tgz, as npm pack fetches it")
    parser.add_argument("dest", type=Path, help="the folder to make")
    args = parser.parse_args()
    if args.dest.exists():
        sys.exit(f"{args.dest} exists already; delete it or name another folder")
    with tarfile.open(args.package) as package:  # once from beginning to end: it is compressed as a whole
        files = {member.name: file.read() for member in package if (file := package.extractfile(member))}
    try:
        classes = chosen(json.loads(files["package/emoji.json"]))
    except ValueError as error:
        sys.exit(f"{args.package}: {error}")
    for name, images in classes.items():
        (args.dest / name).mkdir(parents=True)
        for image in images:
            (args.dest / name / image).write_bytes(files[f"package/img/google/64/{image}"])
    print(f"{args.dest}: {len(classes)} classes of {PER_CLASS} pictures: {', '.join(classes)}")


if __name__ == "__main__":
    main()
