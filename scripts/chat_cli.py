"""Chat in the terminal with a trained model, or with any TGI or OpenAI-compatible server.

python scripts/chat_cli.py --run-dir runs/cpu-demo
python scripts/chat_cli.py --model you/nanochat-d24 -p "Why is the sky blue?"
python scripts/chat_cli.py --endpoint http://127.0.0.1:8000
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("chat")
