"""The tool parser of vLLM's server: `--enable-auto-tool-choice --tool-call-parser nanochat`.

A call is <|python_start|>EXPRESSION<|python_end|>, and the answer ends with it. The client gets it as `tool_calls`
of the function `python`, runs it, and sends the result back in a message of role tool.
"""

import json
import re

from vllm.entrypoints.generate.base import protocol
from vllm.exceptions import VLLMValidationError
from vllm.tool_parsers import ToolParser

MARK = re.compile(r"<\|(?:bos|(?:user|assistant|python|output)_(?:start|end))\|>")
CALL = re.compile(r"<\|python_start\|>(.*?)<\|python_end\|>", re.DOTALL)


class NanoChatToolParser(ToolParser):
    """Calls and text of an answer. Only a call with its end counts: `max_tokens` may cut one off."""

    supports_required_and_named = False  # the model does not write JSON

    def adjust_request(self, request):
        if request.tools and request.tool_choice != "none":
            if request.tool_choice not in (None, "auto"):
                reason = 'tool_choice can be "auto" or "none": the model cannot be made to call a tool'
                raise VLLMValidationError(reason, parameter="tool_choice")
            if any(getattr(getattr(tool, "function", tool), "name", None) != "python" for tool in request.tools):
                raise VLLMValidationError('the model calls the function "python" only', parameter="tools")
            request.skip_special_tokens, request.include_stop_str_in_output = False, True
        return request

    def extract_tool_calls(self, model_output: str, request) -> protocol.ExtractedToolCallInformation:
        functions = [
            protocol.FunctionCall(name="python", arguments=json.dumps({"expression": call}, ensure_ascii=False))
            for call in CALL.findall(model_output)
        ]
        # True even without a call: else vLLM shows the text with its marks
        return protocol.ExtractedToolCallInformation(
            tools_called=True,
            tool_calls=[protocol.ToolCall(function=function) for function in functions],
            content=MARK.split(model_output, maxsplit=1)[0] or None,
        )

    def extract_tool_calls_streaming(
        self, previous_text, current_text, delta_text, previous_token_ids, current_token_ids, delta_token_ids, request
    ) -> protocol.DeltaMessage | None:
        before, now = (self.extract_tool_calls(text, request) for text in (previous_text, current_text))
        done = len(before.tool_calls)
        new = enumerate(now.tool_calls[done:], done)
        calls = [protocol.DeltaToolCall(index=i, **call.model_dump()) for i, call in new]
        text = (now.content or "")[len(before.content or "") :]
        return protocol.DeltaMessage(content=text or None, tool_calls=calls) if text or calls else None
