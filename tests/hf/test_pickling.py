"""What a data loader, Ray or a pool of processes sends can be sent, and copied."""

import copy
import pickle

import pytest
from family import noise

from vilavt_core import errors
from vilavt_core.backends import BackendOptions
from vilavt_core.driver import Driver
from vilavt_core.images import ImageLimits, UrlPolicy
from vilavt_core.presets import PRESETS, Limits, Sampling
from vilavt_core.prompts import PromptSet
from vilavt_core.results import Sample
from vilavt_eval.evaluation_preset import EvaluationPreset
from vilavt_hf import VilavtConfig
from vilavt_hf.chat import VilavtChat

WAYS = {"pickle": lambda value: pickle.loads(pickle.dumps(value)), "copy": copy.deepcopy}


@pytest.fixture(params=WAYS)
def sent(request):
    return WAYS[request.param]


@pytest.mark.parametrize(
    "value",
    [
        *PRESETS.values(),
        Limits(),
        Sampling(),
        ImageLimits(),
        UrlPolicy(),
        PromptSet.load("default"),
        BackendOptions(limits={"max_turns": 2}, prompts=PromptSet.load("default")),
        EvaluationPreset.load("default"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_settings_arrive_as_they_were(sent, value):
    assert sent(value) == value


def test_a_configuration_arrives_as_it_was(sent):
    assert sent(VilavtConfig()).to_dict() == VilavtConfig().to_dict()


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type)], ids=lambda kind: kind.__name__
)
def test_errors_arrive_with_what_they_say(sent, kind):
    error = kind("said")
    error.__dict__.update(dict.fromkeys(vars(error), "kept"))
    again = sent(error)
    assert type(again) is kind
    assert (str(again), vars(again)) == ("said", vars(error))


def test_questions_and_results_arrive_as_they_were(sent, tiny_model, processor):
    chat = VilavtChat(tiny_model, processor, limits=Limits(max_turns=1, max_new_tokens_per_turn=3))
    sample = Sample(noise(0, 84, 84), "what?", id="a")
    assert sent(sample).images[0].tobytes() == sample.images[0].tobytes()
    (result,) = chat.ask_many([sample])
    assert sent(result).to_json() == result.to_json()
    (failed,) = chat.ask_many([Sample("missing.png", "what?")])
    assert str(sent(failed).error) == str(failed.error)
    settings = sent(chat.settings)
    assert settings.provenance(0) == chat.settings.provenance(0)
    driver = Driver(sample, chat.settings)
    driver.start()
    assert sent(driver).request.all_token_ids == driver.request.all_token_ids
