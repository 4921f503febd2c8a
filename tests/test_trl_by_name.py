"""TRL's trainers given a model by its name: they must train that model and not transformers' `nanochat`."""

import shutil

import transformers
from old_folder import make_old
from talker import talker, talker_folder  # noqa: F401
from transformers import AutoConfig
from trl.trainer.utils import create_model_from_path

from nanochat_hf.model import NanoChatForCausalLM, NanoChatModel


def test_transformers_has_no_class_of_our_names():
    assert not [c for c in (NanoChatForCausalLM, NanoChatModel) if hasattr(transformers, c.__name__)]


def test_trl_builds_our_class_from_a_folder_of_today_and_from_an_old_one(talker_folder, tmp_path):  # noqa: F811
    old = make_old(shutil.copytree(talker_folder, tmp_path / "old"))
    for folder in (talker_folder, old):
        assert type(create_model_from_path(str(folder))) is NanoChatForCausalLM
        assert AutoConfig.from_pretrained(folder).architectures == ["NanoChatHFForCausalLM"]
