"""Pushes per second of one sender against the local providers.

    python -m benchmarks.push_throughput [--count 10000] [--only fcm,apns,...] [--profile]

Client and server are a process each; the figure that matters is pushes per second of *client CPU*, printed
beside the wall-clock rate, because on a small machine the server takes cores too.

Variants: fcm and apns are what Carillon uses; fcm-httpcore is firebase-admin with httpx's own transport (its
retries off); aioapns is the library with its connection hardened as docs/adr/0006-apns-client.md describes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from carillon.clock import SystemClock
from carillon.messages import PushJob, PushTarget
from carillon.settings import PushSettings
from carillon.testing.provider_credentials import write_demo_credentials
from channels.ports import make_channel

Send = Callable[[PushJob], Awaitable[bool]]


def job_of(number: int, provider: str) -> PushJob:
    """A typical push to a device of its own."""
    target = PushTarget("device", provider, "token", f"{number:064x}", "", "production", 0)
    return PushJob(
        delivery=number,
        attempt=1,
        tenant="bench",
        user=f"user-{number}",
        slot=number % 1024,
        notification=number.to_bytes(16, "big"),
        seq=number,
        type="comment",
        title="Ada commented on your post",
        body="This is how long the text of a usual notification is, a sentence or two of it.",
        link="https://example.com/posts/42#comment-7",
        collapse_key=f"comment:{number}",
        priority=1,
        badge=3,
        expires_ms=None,
        targets=[target],
        provider=provider,
    )


def start_server(provider: str, folder: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Start a local provider; returns the process and its ready line."""
    command = [sys.executable, "-m", f"carillon.testing.{provider}_server", "--dir", str(folder)]
    process = subprocess.Popen(
        [*command, "--exit-with-parent"], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def load(send: Send, provider: str, count: int, concurrency: int) -> int:
    """Send `count` pushes, `concurrency` at a time; returns how many succeeded."""
    good = 0
    numbers = iter(range(1, count + 1))

    async def worker() -> None:
        nonlocal good
        for number in numbers:
            sent = await send(job_of(number, provider))
            good += sent

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return good


async def open_channel(provider: str, settings: PushSettings, variant: str) -> tuple[Send, Any]:
    """Carillon's own channel, or firebase-admin over httpx's transport."""
    channel = make_channel(provider, settings, SystemClock())
    await channel.open()
    if variant == "fcm-httpcore":
        import httpx
        from firebase_admin import messaging

        from channels.http2 import client_tls

        service: Any = messaging._get_messaging_service(channel._app)  # type: ignore[attr-defined]
        from firebase_admin import _http_client
        from firebase_admin._retry import HttpxRetry

        tls = client_tls(settings.fcm_ca_file)
        stock = _http_client.HttpxAsyncClient(credential=service._credential, timeout=30)
        for pattern in stock._mounts:
            transport = stock._mounts[pattern]
            transport._retry = HttpxRetry(max_retries=0)
            transport._wrapped_transport = httpx.AsyncHTTPTransport(verify=tls, http2=True)
        service._async_client = stock

    async def send(job: PushJob) -> bool:
        (results,) = await channel.send([job])
        return all(result.outcome == "sent" for result in results)

    return send, channel


async def open_aioapns(settings: PushSettings) -> tuple[Send, Any]:
    """aioapns 4.0 with what it needs to reach a local server and to survive."""
    import urllib.parse

    import aioapns
    from aioapns.connection import APNsTLSClientProtocol

    from channels.apns import apns_payload
    from channels.http2 import client_tls

    url = urllib.parse.urlsplit(settings.apns_url)

    class Protocol(APNsTLSClientProtocol):
        APNS_SERVER = url.hostname or ""
        APNS_PORT = url.port or 443

        def on_data_received(self, raw_data: bytes, stream_id: int) -> None:
            self.conn.acknowledge_received_data(len(raw_data), stream_id)
            super().on_data_received(raw_data, stream_id)

        def on_stream_ended(self, stream_id: int) -> None:
            self.request_streams.pop(stream_id, None)
            super().on_stream_ended(stream_id)

    tls = client_tls(settings.apns_ca_file)
    tls.set_alpn_protocols(["h2"])
    client = aioapns.APNs(
        key=Path(settings.apns_key_file).read_text(),  # noqa: ASYNC240  once, before the measurement
        key_id=settings.apns_key_id,
        team_id=settings.apns_team_id,
        topic=settings.apns_topic,
        ssl_context=tls,
        max_connections=2,
    )
    client.pool.protocol_class = Protocol

    async def send(job: PushJob) -> bool:
        request = aioapns.NotificationRequest(
            device_token=job.targets[0].token,
            message=json.loads(apns_payload(job)),
            collapse_key=job.collapse_key,
            push_type=aioapns.PushType.ALERT,
        )
        return (await client.send_notification(request)).is_successful

    return send, None


async def measure(variant: str, count: int, concurrency: int, profile: bool) -> None:
    """Run one variant and print its line."""
    provider = "fcm" if variant.startswith("fcm") else "apns"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process, ready = start_server(provider, folder / provider)
        try:
            other = {provider: ready}
            values: dict[str, Any] = write_demo_credentials(folder, other.get("fcm"), other.get("apns"))
            settings = PushSettings(timeout_s=60.0, **values)
            if variant == "aioapns":
                send, channel = await open_aioapns(settings)
            else:
                send, channel = await open_channel(provider, settings, variant)
            await load(send, provider, 200, concurrency)
            forget = urllib.request.Request(ready["receivedUrl"], method="DELETE")  # noqa: S310
            urllib.request.urlopen(forget).close()  # noqa: S310, ASYNC210
            server_before, client_before = cpu_s(process.pid), resource.getrusage(resource.RUSAGE_SELF)
            began = time.perf_counter()
            if profile:
                import cProfile
                import pstats

                with cProfile.Profile() as profiler:
                    good = await load(send, provider, count, concurrency)
                pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
            else:
                good = await load(send, provider, count, concurrency)
            wall_s = time.perf_counter() - began
            after = resource.getrusage(resource.RUSAGE_SELF)
            client_s = after.ru_utime + after.ru_stime - client_before.ru_utime - client_before.ru_stime
            server_s = cpu_s(process.pid) - server_before
            with urllib.request.urlopen(ready["receivedUrl"] + "?limit=0") as answer:  # noqa: S310, ASYNC210
                received = json.load(answer)["count"]
            assert received == count == good, (received, count, good)
            print(
                f"{variant:13} {count} pushes, {concurrency} at once: {count / wall_s:7.0f}/s wall, "
                f"{count / client_s:7.0f}/s per client core, "
                f"{count / max(server_s, 0.01):7.0f}/s per server core"
            )
            if channel is not None:
                await channel.close()
        finally:
            process.terminate()
            process.wait(10)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--only", default="fcm,fcm-httpcore,apns,aioapns")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for variant in arguments.only.split(","):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(measure(variant, arguments.count, arguments.concurrency, arguments.profile))


if __name__ == "__main__":
    main()
