"""What a model folder brings for generation besides the network: its text pipeline, and the tool loop in every copy.

- `NanoChatHFTextGenerationPipeline` is what `pipeline("text-generation", model=FOLDER, trust_remote_code=True)` builds
  (`custom_pipelines` in config.json); where the package is imported, it is the pipeline of all models. transformers'
  own leaves special tokens in texts that it does not parse: the end mark of a prefilled reply, a batch's padding.
- `ToolLoopMixin` makes `save_pretrained` and `push_to_hub` copy `custom_generate/`, which transformers leaves behind;
  so merged, quantized and re-sharded copies of a chat model answer their own calls.

Uploaded with every checkpoint: imports only torch and transformers.
"""

import os
import shutil
from pathlib import Path

from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from transformers import TextGenerationPipeline
from transformers.pipelines.text_generation import ReturnType
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)
TOOL_LOOP = ("generate.py", "tools.py")  # the files of custom_generate/; transformers imports the first


class NanoChatHFTextGenerationPipeline(TextGenerationPipeline):
    """transformers' pipeline, but every text ends at the first end mark, and prefilled replies are parsed.

    Changes only the texts of tokenizers with our response template: importing the package installs it for all models.
    """

    def postprocess(self, model_outputs, return_type=ReturnType.FULL_TEXT, continue_final_message=None, **kwargs):
        options = {"return_type": return_type, "continue_final_message": continue_final_message, **kwargs}
        records = super().postprocess(model_outputs, **options)
        prompt = model_outputs["prompt_text"]
        if "tool_steps" not in (getattr(self.tokenizer, "response_template", None) or {}).get("fields", ()):
            return records
        for record in records:
            text = record.get("generated_text")
            if isinstance(text, str):
                begin = len(prompt) if return_type == ReturnType.FULL_TEXT else 0
                record["generated_text"] = text[:begin] + self.until_end(text[begin:])
            elif isinstance(text, list):
                begin = ""
                if len(text) == len(prompt.messages):  # the last message was continued, and not parsed
                    begin = prompt.messages[-1]["content"]
                    text[-1] |= self.tokenizer.parse_response(text[-1]["content"][len(begin) :], prefix="")
                text[-1]["content"] = begin + self.until_end(text[-1]["content"])  # of an old template, not yet cut
        return records

    def until_end(self, text: str) -> str:
        return text.partition(self.tokenizer.eos_token)[0].partition(self.tokenizer.bos_token)[0]


def find_tool_loop(model) -> Path | None:
    """Returns the folder custom_generate/ of what `model` was loaded from, or None.

    Raises OSError if that cannot be looked up: the folder is gone, or a Hub id is not cached and there is no network.
    """
    code = getattr(getattr(vars(model).get("generate"), "func", None), "__code__", None)
    if code is not None and Path(code.co_filename).parent.name == "custom_generate":
        return Path(code.co_filename).parent  # a partial, put there by from_pretrained with trust_remote_code
    name, subfolder, cache = getattr(model, "loaded_from", (model.name_or_path, "", None))
    if not name:
        return None
    if os.path.isdir(name):
        folder = Path(name) / subfolder / "custom_generate"
        return folder if (folder / TOOL_LOOP[0]).exists() else None
    where, paths = {"revision": getattr(model.config, "_commit_hash", None), "cache_dir": cache}, []
    for file in (os.path.join(subfolder, "custom_generate", file) for file in TOOL_LOOP):
        paths.append(cached_file(name, file, **where, _raise_exceptions_for_missing_entries=False))
        if paths[-1] is None and try_to_load_from_cache(name, file, **where) is not _CACHED_NO_EXIST:
            raise OSError(f"{file} is not in the cache, and the Hub cannot be reached")
    return Path(paths[0]).parent if all(paths) else None


class ToolLoopMixin:
    """For a model class, before PreTrainedModel: copies the tool loop to wherever the model is saved or pushed."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if name := str(pretrained_model_name_or_path or ""):
            if os.path.isdir(name):
                name = os.path.abspath(name)  # a relative one would be lost when the working directory changes
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.loaded_from = (name, kwargs.get("subfolder") or "", kwargs.get("cache_dir"))
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs):
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            self.copy_tool_loop(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        self.copy_tool_loop(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def copy_tool_loop(self, folder: str | os.PathLike) -> None:
        target = Path(folder) / "custom_generate"
        if (target / TOOL_LOOP[0]).exists():
            return
        try:
            if source := find_tool_loop(self):
                target.mkdir(parents=True, exist_ok=True)
                for file in TOOL_LOOP:
                    shutil.copyfile(source / file, target / file)
        except OSError as error:
            shutil.rmtree(target, ignore_errors=True)
            logger.warning_once(
                f"{folder} has no custom_generate/: if this is a chat model, copy it from {self.name_or_path}, or "
                f"`generate` does not answer calls ({str(error).splitlines()[0]})"
            )


__all__ = ["NanoChatHFTextGenerationPipeline", "ToolLoopMixin"]
