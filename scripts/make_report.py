"""Write a run's report card (report.md, report.html, report.json, plots/), or compare two runs.

python scripts/make_report.py --run-dir runs/d12 --node-hourly-rate 24
python scripts/make_report.py --compare runs/a runs/b
python scripts/make_report.py --run-dir runs/d12 --row
python scripts/make_report.py --collection you/nanochat-d12=runs/d12 you/nanochat-d24=runs/d24
"""

import argparse
import sys
from pathlib import Path

from nanochat_hf.errors import InputError, guarded
from nanochat_hf.eval.report import collect, compare, make_report, results_row
from nanochat_hf.hub.model_card import collection_table
from nanochat_hf.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", help="run folder, for example runs/d12")
    price = "price of the machine in dollars per hour"
    parser.add_argument("--node-hourly-rate", "--hourly-rate", dest="hourly_rate", type=float, help=price)
    parser.add_argument("--compare", nargs=2, metavar="RUN", help="two run folders")
    parser.add_argument("--row", action="store_true", help="only print the run's row of evals/RESULTS.md")
    parser.add_argument("--collection", nargs="+", metavar="REPO=RUN", help="print a Hub collection's text instead")
    arguments = parser.parse_args()
    if arguments.collection:
        named = [word.partition("=") for word in arguments.collection]
        if not all(folder for _, _, folder in named):
            raise InputError("--collection expects REPO=RUN, for example you/nanochat-d12=runs/d12")
        print(collection_table({repo: Run(folder) for repo, _, folder in named}))
        return
    if bool(arguments.run_dir) == bool(arguments.compare):
        raise InputError("name one run with --run-dir, or two with --compare")
    if arguments.row and arguments.compare:
        raise InputError("--row is about one run: name it with --run-dir")
    if arguments.compare:
        print(compare(*arguments.compare))
    elif arguments.row:
        report = Path(arguments.run_dir) / "report.md"
        facts = collect(Run(arguments.run_dir))
        print(*(f"note: {note}\n" for note in facts["notes"]), sep="", end="", file=sys.stderr)
        print(results_row(facts, f"[report]({report})" if report.is_file() else "-"))
    else:
        print(make_report(arguments.run_dir, arguments.hourly_rate))


if __name__ == "__main__":
    guarded(main)
