"""Write a run's report card (report.md, report.html, report.json, plots/), or compare runs.

python scripts/make_report.py --run-dir runs/d12 --node-hourly-rate 24
python scripts/make_report.py --compare runs/a runs/b
python scripts/make_report.py --run-dir runs/d12 --row
python scripts/make_report.py --collection you/nanochat-d12=runs/d12 you/nanochat-d24=runs/d24
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("report")
