"""Model folders as they were saved until November 2026: class names that transformers has too."""

import json
import re
from pathlib import Path


def make_old(folder: Path) -> Path:
    """Rewrites a folder of today: old names in config.json and in the model's code, no file that came later."""
    path = folder / "config.json"
    config = json.loads(path.read_text().replace("NanoChatHF", "NanoChat"))
    del config["custom_pipelines"]
    path.write_text(json.dumps(config))
    modeling = folder / "modeling_nanochat.py"
    code = modeling.read_text().replace("from .generation_nanochat import ToolLoopMixin\n", "")
    code = re.sub(r"^NanoChat\w+(, \w+)? = NanoChatHF.*\n", "", code.replace("ToolLoopMixin, ", ""), flags=re.M)
    modeling.write_text(code.replace("NanoChatHF", "NanoChat"))
    configuration = folder / "configuration_nanochat.py"
    code = re.sub(r"^NanoChatConfig = NanoChatHFConfig.*\n", "", configuration.read_text(), flags=re.M)
    configuration.write_text(code.replace("NanoChatHF", "NanoChat").replace("def to_dict", "def _to_dict"))
    (folder / "generation_nanochat.py").unlink()
    return folder
