"""Serve a trained model over HTTP: a chat page for browsers, OpenAI's and TGI's routes for programs.

python scripts/chat_web.py --run-dir runs/cpu-demo [--host 127.0.0.1] [--port 8000]
python scripts/chat_web.py --model you/nanochat-d24
"""

import argparse

from nanochat_hf.errors import InputError, guarded
from nanochat_hf.run import Run
from nanochat_hf.serve.limits import run
from nanochat_hf.serve.server import Server
from nanochat_hf.serve.worker import open_workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", help="run folder: its newest finished stage")
    parser.add_argument("--model", help="checkpoint folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets the network in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch-size", "--rows", type=int, default=16, help="requests that run at once per GPU")
    parser.add_argument("--max-queue-size", "--max-waiting", type=int, default=64, help="that wait; more get a 429")
    parser.add_argument("--max-new-tokens", type=int, default=Server.max_new_tokens)
    parser.add_argument(
        "--request-timeout",
        "--max-seconds",
        type=float,
        default=Server.request_timeout,
        help="seconds, then it is cut",
    )
    parser.add_argument("--temperature", type=float, default=Server.temperature, help="where a request has none")
    parser.add_argument("--top-k", type=int, default=Server.top_k)
    parser.add_argument("--device", help="one device; by default a replica on each GPU, else the CPU")
    args = parser.parse_args()
    name = args.model or (args.run_dir and Run(args.run_dir).latest_model())
    if not name:
        raise InputError("name the model: --run-dir DIR with a finished stage, or --model FOLDER_OR_HUB_ID")
    workers = open_workers(str(name), args.max_batch_size, args.max_queue_size, args.device)
    server = Server(workers, str(name), args.temperature, args.top_k, args.max_new_tokens, args.request_timeout)
    run(server.app, args.host, args.port)


if __name__ == "__main__":
    guarded(main)
