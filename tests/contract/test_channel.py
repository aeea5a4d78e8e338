"""Control messages through the host's own client and dispatcher, without a model."""

from __future__ import annotations

import asyncio
import pickle
import threading
from types import SimpleNamespace

import pytest
import zmq

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.integration import sglang_api
from sglang_cachedit_plugin.serving import channel

ARGS = {
    "log_requests": False, "log_requests_level": 0, "log_requests_format": "text", "log_requests_target": None,
    "scheduler_rpc_timeout": 20,
}


_ONE_REPLICA = threading.Lock()
"""The settings belong to a process, and here the replicas are threads of one."""


class Scheduler(threading.Thread):
    """A socket as the host's scheduler has it; answers one message as ``reply`` says."""

    def __init__(self, context: zmq.Context, reply):
        super().__init__(daemon=True)
        self.socket = context.socket(zmq.ROUTER)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.reply = reply
        self.received: list = []

    def run(self) -> None:
        identity, _, payload = self.socket.recv_multipart()
        self.received.append(pickle.loads(payload))
        self.socket.send_multipart([identity, b"", pickle.dumps(self.reply(self.received[-1]))])


@pytest.fixture
def replicas(monkeypatch):
    """Makes schedulers that answer as given, and the host's real client for them."""
    from sglang.multimodal_gen.runtime import scheduler_client

    context = zmq.Context()
    client = scheduler_client.AsyncSchedulerClient()
    monkeypatch.setattr(scheduler_client, "async_scheduler_client", client)
    made: list[Scheduler] = []

    def make(*replies):
        made.extend(Scheduler(context, reply) for reply in replies)
        client.initialize(SimpleNamespace(scheduler_endpoints=[each.endpoint for each in made], **ARGS))
        for each in made:
            each.start()
        return made

    yield make
    for each in made:
        each.join(timeout=20)
        each.socket.close(linger=0)
    context.term()
    client.context.destroy(linger=0)


@pytest.fixture(autouse=True)
def start_up(monkeypatch):
    monkeypatch.setattr(effective, "_current", Defaults())
    monkeypatch.setattr(sglang_api, "gather_replica", lambda value: [value])


def dispatched(message):
    """What the host's scheduler makes of a message, in a replica that has made no change yet."""
    from sglang.multimodal_gen.runtime.managers.scheduler import Scheduler as HostScheduler

    scheduler = SimpleNamespace(server_args=SimpleNamespace(cache_dit_config=None), request_handlers={})
    original = HostScheduler._dispatch_single_request
    scheduler._dispatch_single_request = lambda request: channel.dispatch(original, scheduler, request)
    ((identity, request),) = HostScheduler._normalize_received_payload(b"client", message)
    assert identity == b"client"
    with _ONE_REPLICA:
        effective.install(Defaults())
        return HostScheduler._dispatch_items(scheduler, [(identity, request)])


def test_every_replica_gets_the_message_and_its_answer_comes_back(replicas):
    made = replicas(dispatched, dispatched)
    told = asyncio.run(channel.tell("set", {"max_warmup_steps": 6}, 1))
    assert [each["replica"] for each in told] == [0, 1]
    assert {rank["settings"] for each in told for rank in each["ranks"]} == {effective.current().fingerprint()}
    assert effective.current().decide(None, None).resolved.primary.max_warmup_steps == 6
    assert [type(each.received[0].text) for each in made] == [str, str]


def test_a_replica_that_refuses_is_named(replicas):
    bad = channel.CacheDitControl('{"do": "set", "settings": {"x": 1}, "number": 1}')
    replicas(dispatched, lambda message: dispatched(bad))
    with pytest.raises(channel.ChannelError, match="replica 1: x = 1"):
        asyncio.run(channel.tell("set", {}, 1))


def test_a_host_without_the_hook_is_noticed(replicas):
    from sglang.multimodal_gen.runtime.managers.scheduler import Scheduler as HostScheduler

    bare = SimpleNamespace(request_handlers={})
    replicas(lambda message: HostScheduler._dispatch_single_request(bare, message))
    with pytest.raises(channel.ChannelError, match="Unknown request type"):
        asyncio.run(channel.tell("show"))


def test_before_the_server_is_ready_there_is_no_channel(monkeypatch):
    from sglang.multimodal_gen.runtime import scheduler_client

    monkeypatch.setattr(scheduler_client, "async_scheduler_client", scheduler_client.AsyncSchedulerClient())
    with pytest.raises(ConnectionError, match="not ready"):
        asyncio.run(channel.tell("show"))
