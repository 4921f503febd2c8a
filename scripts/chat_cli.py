"""Chat in the terminal with a trained model, or with any TGI or OpenAI-compatible server.

python scripts/chat_cli.py --run-dir runs/cpu-demo
python scripts/chat_cli.py --model you/nanochat-d24 -p "Why is the sky blue?"
python scripts/chat_cli.py --endpoint http://127.0.0.1:8000
"""

import argparse

from nanochat_hf.errors import guarded
from nanochat_hf.serve.terminal_chat import Chat, Options, open_model, system_language, temperature


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", help="run folder: its newest finished stage")
    parser.add_argument("--model", help="checkpoint folder or Hub id; beside --endpoint, the model's name there")
    parser.add_argument("--endpoint", help="URL of a server to talk to instead")
    parser.add_argument("-p", "--prompt", help="answer this and leave")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--temperature", type=temperature, default=Options.temperature, help="0 to 5, 0 is greedy")
    parser.add_argument("--top-k", type=int, default=Options.top_k, help="0 keeps every token")
    parser.add_argument("--top-p", type=float, default=Options.top_p)
    parser.add_argument("--max-new-tokens", type=int, default=Options.max_new_tokens)
    parser.add_argument("--seed", type=int, help="the same answers every time")
    parser.add_argument("--device", help="cuda, cpu, ...; the GPU if there is one")
    parser.add_argument("--language", choices=("en", "ko"), default=system_language(), help="of the interface")
    args = parser.parse_args()
    model = open_model(args.model, args.run_dir, args.endpoint, args.device)
    options = Options(args.temperature, args.top_k, args.top_p, args.max_new_tokens, args.seed)
    chat = Chat(model, options, args.system, language=args.language)
    if args.prompt is not None:
        chat.ask(args.prompt)
    else:
        chat.run()


if __name__ == "__main__":
    guarded(main)
