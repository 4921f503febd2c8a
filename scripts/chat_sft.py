"""Mid-training or SFT: teach the newest model of RUN_DIR to chat, into RUN_DIR/mid or /sft; run again to resume.

accelerate launch scripts/chat_sft.py --config recipes/d12/sft.yaml --run-dir runs/d12 [--lora_r 16 ...]
python scripts/chat_sft.py --config recipes/cpu-demo/mid.yaml --run-dir runs/cpu-demo --stage mid
accelerate launch scripts/chat_sft.py ... --chatcore_every 200 --eval recipes/d12/eval.yaml    # ChatCORE on the way
"""

from nanochat_hf.config import script
from nanochat_hf.stages import run_chat
from nanochat_hf.train.sft import ChatConfig

if __name__ == "__main__":
    script(
        ChatConfig,
        lambda config, run, eval=None, **options: run_chat(config, run, tasks=eval, **options),
        stage="mid or sft: the folder that the result goes to (default: sft)",
        model="folder or Hub id of the model to begin with (default: the newest of the run folder)",
        eval="eval.yaml with the chat tasks of ChatCORE, measured every chatcore_every steps",
    )
