"""Serve a trained model over HTTP: a chat page for browsers, OpenAI's and TGI's routes for programs.

python scripts/chat_web.py --run-dir runs/cpu-demo [--host 127.0.0.1] [--port 8000]
python scripts/chat_web.py --model you/nanochat-d24
"""

from nanochat_hf.cli import main

if __name__ == "__main__":
    main("serve")
