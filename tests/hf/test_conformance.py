"""`VilavtChat` has the methods of every backend, and they do what the suite says."""

from conformance import conforms, signatures_are_those_of_the_protocol

from vilavt_core.backends import AsyncBackend, Backend
from vilavt_core.client import ServerClient
from vilavt_core.shipped import shipped
from vilavt_hf import VilavtChat


def test_names_arguments_and_defaults_are_those_of_the_protocol():
    signatures_are_those_of_the_protocol(VilavtChat)
    signatures_are_those_of_the_protocol(ServerClient)


def test_the_async_protocol_has_the_arguments_of_the_other():
    import inspect

    for name in ("ask", "ask_many", "iter_many", "stream", "conversation", "provenance"):
        told = [inspect.signature(getattr(kind, name)).parameters for kind in (Backend, AsyncBackend)]
        assert [(p.name, p.default) for p in told[0].values()] == [(p.name, p.default) for p in told[1].values()]


def test_a_local_model_conforms():
    conforms(VilavtChat.from_pretrained(shipped("vilavt-tiny"), dtype="float32"), local=True)
