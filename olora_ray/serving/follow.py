"""Let an inference engine follow an alias: it answers with the version to which
the alias points, within five seconds.

    olora-ray follow NAME@ALIAS --engine URL [--base FOLDER] [--key KEY]
        [--listen HOST:PORT
            [--challenger NAME@ALIAS [--share 0.1] [--rows FILE]]
            [--keep FOLDER [--keep-share 0.05] [--keep-days 30] [--keep-gb 1]
                [--redact MODULE:FUNCTION]]]
    olora-ray follow NAME@ALIAS --mirror PLACE

NAME@ALIAS      a registered model and its alias (chats@champion), or a version
                (chats@7)
--engine        a vLLM or SGLang server on this machine, http://HOST:PORT: it
                serves the adapter as model NAME@ALIAS, but with --listen under
                a name of the version, and clients ask --listen for NAME@ALIAS
--base          the folder of the engine's base model, if the engine does not
                name one that this process can read
--key           the engine's API key: env:VARIABLE or file:/PATH, not the key
                itself
--listen        answer HTTP here: /v1/ as the engine does, which also checks its
                API key, but for loading adapters; the header x-olora-version
                says which version answered; /health is the engine's own, and
                503 while it has no version; /metrics is for Prometheus
--challenger    what answers a share of the requests for NAME@ALIAS; NAME@ALIAS
                answers if it fails before it has begun its answer, and while no
                version of it can be loaded
--share         how much of the requests, drawn at random; default: 0.1
--rows          NAME@ALIAS answers all requests, and of the share of the chats
                that end by themselves the challenger is asked afterwards, for
                at most eight at once; both answers are appended to this file,
                as rows that olora-ray evaluate reads
--keep          a folder that gets chats which ended by themselves as rows, one
                file per day (UTC), and the ratings and corrections that POST
                /feedback sends; `olora-ray feedback` makes training data of
                them
--keep-share    how much of the chats, drawn at random; chats with feedback are
                kept anyway; default: 0.05
--keep-days     delete files that are older, and the oldest ones of more than
                --keep-gb; defaults: 30 days, 1 GB
--redact        a function that gets each row before it is written, and returns
                the row to write, or None for no row
--mirror        a folder or bucket that gets each version as PLACE/NAME@VERSION,
                where Ray Serve LLM loads adapters (dynamic_lora_loading_path),
                and then the file PLACE/NAME@ALIAS with the name of that folder
--cache         a folder for the adapters, which the engine can read; default:
                ~/.cache/olora_ray/adapters
--verify        a file with a public key (PEM): only versions that its private
                key has signed are loaded; default: OLORA_VERIFY
--tracking-uri  as for `olora-ray registry`

The command asks MLflow every two seconds and prints a line per change. It loads
a version only if all its files have their checksums and the engine has its base
model; otherwise, and while MLflow is unreachable, the engine keeps the version
that it has. A start without MLflow takes the last version from the cache. An
engine that was restarted gets the adapter again. SIGTERM or Ctrl+C ends the
command, after the answers that --listen has begun; the engine keeps its
adapter.

Exit codes: 0 ended by a signal; 2 an error that you can fix.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.common.logs import quiet_environment
from olora_ray.config import command_line
from olora_ray.serving.engine import Engine
from olora_ray.serving.proxy import Proxy
from olora_ray.serving.watch import CACHE, SECONDS, Adapter, Attempts, Watch
from olora_ray.tracking import start

logger = logging.getLogger(__name__)

# Option -> another one that it needs.
NEEDS = {
    "--listen": "--engine",
    "--challenger": "--listen",
    "--share": "--challenger",
    "--rows": "--challenger",
    "--keep": "--listen",
    "--keep-share": "--keep",
    "--keep-days": "--keep",
    "--keep-gb": "--keep",
    "--redact": "--keep",
}
OPTIONS = [
    "--engine",
    "--base",
    "--key",
    *NEEDS,
    "--mirror",
    "--cache",
    "--verify",
    "--tracking-uri",
]


def main(argv: list[str]) -> None:
    parsed = command_line.parse(argv or ["--help"], __doc__ or "", options=OPTIONS)
    options = parsed.options
    if len(parsed.words) != 1 or not options.keys() & {"--engine", "--mirror"}:
        raise UserError(
            "usage: olora-ray follow NAME@ALIAS --engine URL, or --mirror PLACE, or both; see --help"
        )
    for option in options:
        if option in NEEDS and NEEDS[option] not in options:
            raise UserError(f"argument {option}: needs {NEEDS[option]}; see --help")
    quiet_environment()  # before MLflow is imported
    (name,) = parsed.words
    uri = start.chosen_uri(options.get("--tracking-uri"))
    cache = Path(command_line.absolute(options.get("--cache", str(CACHE))))
    verify = options.get("--verify")
    names = [each for each in (name, options.get("--challenger")) if each]
    watches = [Watch(each, uri, cache, verify) for each in names]
    givers = []
    if "--engine" in options:
        engine = Engine(
            options["--engine"], options.get("--base"), options.get("--key"), "--listen" in options
        )
        givers.append(Giver(watches, engine.serve))
    if "--mirror" in options:
        givers.append(Giver(watches[:1], Mirror(options["--mirror"]).write))
    proxy = None
    if "--listen" in options:
        proxy = Proxy(engine, watches, options, wake=givers[0].look_now)
    stop = threading.Event()
    threads = [threading.Thread(target=giver.run) for giver in givers]
    for thread in threads:
        thread.start()

    def follow() -> None:
        while not stop.is_set():
            for watch in watches:
                before = watch.current
                if watch.look() is not before:
                    for giver in givers:
                        giver.look_now()
            stop.wait(SECONDS)

    # A daemon: MLflow may take long to answer.
    threading.Thread(target=follow, daemon=True).start()
    if proxy:
        proxy.run()
    else:
        caught: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: caught.append(number))
        # No lock: a wait without an end does not see a signal that another thread has received.
        while not caught:
            time.sleep(1)
    stop.set()
    for giver in givers:
        giver.stop()
    logger.info(f"{name}: not followed any more; the engine keeps its adapter")


class Giver:
    """Gives the current adapters to an engine or a mirror, again and again. MLflow may hang meanwhile."""

    def __init__(self, watches: Sequence[Watch], give: Callable[[str, Adapter], None]) -> None:
        self._given = [(watch, Attempts(watch.name)) for watch in watches]
        self._give = give
        self._now = threading.Event()
        self._stopped = False

    def run(self) -> None:
        recall_at = time.monotonic() + 2 * SECONDS
        while not self._stopped:
            self._now.clear()
            for watch, attempts in self._given:
                if time.monotonic() > recall_at:
                    watch.recall()
                adapter = watch.current
                if adapter is None or attempts.resting(str(adapter)):
                    continue
                with attempts.attempt(str(adapter)):
                    self._give(watch.name, adapter)
            self._now.wait(SECONDS)

    def look_now(self) -> None:
        self._now.set()

    def stop(self) -> None:
        self._stopped = True
        self._now.set()


class Mirror:
    """A folder or bucket of adapters for Ray Serve LLM, which loads a folder once, so each version has its own."""

    def __init__(self, place: str) -> None:
        self._place = command_line.absolute(place)
        self._written = ""

    def write(self, name: str, adapter: Adapter) -> None:
        folder = adapter.name
        if folder == self._written:
            return
        copy = storage.join(self._place, folder)
        # Ray Serve LLM asks for this file first.
        node_cache.upload(adapter.folder, copy, last="adapter_config.json")
        storage.write_text(storage.join(self._place, name), f"{folder}\n")
        self._written = folder
        logger.info(f"{name}: {adapter} lies in {copy}")
