"""Write a run's report card (report.md, report.html, report.json, plots/), or compare two runs.

python scripts/make_report.py --run-dir runs/d12 --hourly-rate 24
python scripts/make_report.py --compare runs/a runs/b
"""

import argparse

from nanochat_hf.errors import InputError
from nanochat_hf.eval.report import compare, make_report
from nanochat_hf.run import guarded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", help="run folder, for example runs/d12")
    parser.add_argument("--hourly-rate", type=float, help="price of the machine in dollars an hour")
    parser.add_argument("--compare", nargs=2, metavar="RUN", help="two run folders")
    arguments = parser.parse_args()
    if bool(arguments.run_dir) == bool(arguments.compare):
        raise InputError("name one run with --run-dir, or two with --compare")
    print(compare(*arguments.compare) if arguments.compare else make_report(arguments.run_dir, arguments.hourly_rate))


if __name__ == "__main__":
    guarded(main)
