"""Direct preference optimization (DPO) of the newest chat model of RUN_DIR, into RUN_DIR/dpo; run again to resume.

accelerate launch scripts/chat_dpo.py --config recipes/d12/dpo.yaml --run-dir runs/d12 [--lora_r 16 ...]
python scripts/chat_dpo.py --config recipes/d12/dpo.yaml --run-dir runs/d12 --dataset pairs.jsonl
"""

from nanochat_hf.config import script
from nanochat_hf.stages import run_dpo
from nanochat_hf.train.dpo import DPOStageConfig

if __name__ == "__main__":
    options = {"model": "folder or Hub id of the model to begin with (default: the newest of the run folder)"}
    script(DPOStageConfig, run_dpo, **options)
