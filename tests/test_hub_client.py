"""What the Hub's client meets on the way, refusals and broken connections, each of which is one line."""

import pytest
from hub_run import TOKEN, hub_run, pushed, stand_in, without_check  # noqa: F401
from talker import talker, talker_folder  # noqa: F401

from nanochat_hf.errors import InputError
from nanochat_hf.hub import push as hub_client
from nanochat_hf.hub.push import Push, push


def test_a_hub_that_stays_down_is_one_line_and_the_next_push_goes_on(hub, run, no_check):
    hub.fail("POST", "/commit/", None, times=50)
    with pytest.raises(InputError, match="run the same command again"):
        push(run, Push("you/small"))
    assert pushed(hub) == {}  # a commit or nothing
    hub.faults.clear()
    before = len(hub.requests)
    push(run, Push("you/small"))
    assert not any(line.startswith("PUT") for line in hub.requests[before:]) and "config.json" in pushed(hub)


@pytest.mark.parametrize(
    "method,where,status,words",
    [
        ("POST", "repos/create", 401, "hf auth login"),
        ("POST", "repos/create", 403, "may not write to you/small"),
        ("POST", "preupload", 404, "not there"),
        ("POST", "commit", 429, "slow down"),
    ],
)
def test_each_refusal_of_the_hub_becomes_one_line_of_advice(hub, run, no_check, method, where, status, words):
    hub.fail(method, where, status, times=10)
    with pytest.raises(InputError, match=words) as caught:
        push(run, Push("you/small"))
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_token_and_no_token_are_told_apart(hub, run, monkeypatch):
    monkeypatch.setattr(hub_client, "get_token", lambda: "hf_wrong")
    with pytest.raises(InputError, match="does not accept the token"):
        push(run, Push("you/small"))
    monkeypatch.setattr(hub_client, "get_token", lambda: None)
    with pytest.raises(InputError, match="no Hub token"):
        push(run, Push("you/small"))
