"""Prints what refusing hostile files takes: `python tests/hostile [--fresh] [CASE ...]`.

The exit status is 1 where a file is not refused as it should be.
With `--serve`, names of cases are read from stdin, and a line of JSON for each is written.
"""

import json
import sys

import harness


def main():
    options = {argument for argument in sys.argv[1:] if argument.startswith("--")}
    names = [argument for argument in sys.argv[1:] if argument not in options]
    harness.prepare()
    if "--serve" in options:
        for line in sys.stdin:
            print(json.dumps(harness.run(line.strip())), flush=True)
        return
    results = []
    for name in names or harness.cases():
        results.append(harness.run(name, fresh="--fresh" in options))
        result = results[-1]
        print(f"{name}: {result['seconds']:.1f} s, {result['mebibytes']:.0f} MiB, status {result['status']}")
        print(f"    {result['errors'].strip()}", *(f"    WRONG: {what}" for what in result["problems"]), sep="\n")
    print("\n| kind | tries | CPU seconds, at most | MiB, at most | exit status |\n|---|---|---|---|---|")
    for kind in dict.fromkeys(result["name"].partition("-")[0] for result in results):
        of = [result for result in results if result["name"].partition("-")[0] == kind]
        seconds, mebibytes = max(result["seconds"] for result in of), max(result["mebibytes"] for result in of)
        counts = {status: [result["status"] for result in of].count(status) for status in (2, 0)}
        counts["other"] = len(of) - sum(counts.values())
        statuses = ", ".join(f"{status}: {count}" for status, count in counts.items() if count)
        print(f"| {kind} | {len(of)} | {seconds:.1f} | {mebibytes:.0f} | {statuses} |")
    sys.exit(any(result["problems"] for result in results))


if __name__ == "__main__":
    main()
