"""vLLM and llama.cpp answer with the quickstart's exports as transformers does.

`make serve-test` installs both engines beside the project and runs this; elsewhere it is skipped.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.go_template import as_go_does
from tests.pipelines import project
from tests.ran import ran
from tests.ray_head import free_port
from tests.serving import served
from tests.serving.served import Answer, Served
from tests.waiting import until

pytestmark = pytest.mark.slow
VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
LLAMA_CPP = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
EXACT = 1e-4
"""Largest difference of log-probabilities in float32."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return served.make(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def merged(run: Served) -> list[Answer]:
    """The answers of the merged model in transformers."""
    model = AutoModelForCausalLM.from_pretrained(run.folder.merged, dtype=torch.float32)
    return served.answers(model, AutoTokenizer.from_pretrained(run.folder.merged), run.chats)


@pytest.fixture(scope="module")
def adapter(run: Served) -> list[Answer]:
    """The answers of base and adapter in PEFT."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run.folder.adapter)
    return served.answers(model, AutoTokenizer.from_pretrained(run.folder.adapter), run.chats)


# vLLM.


class Server:
    def __init__(self, address: str, model: str) -> None:
        self.address, self.model = address, model

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        data = json.dumps({"model": self.model, "temperature": 0, **body}).encode()
        request = urllib.request.Request(
            f"{self.address}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            found: dict[str, Any] = json.load(response)["choices"][0]
        return found

    def told(self, chat: served.Chat) -> str:
        message = self.ask("/v1/chat/completions", messages=chat, max_tokens=served.LENGTH)[
            "message"
        ]
        return str(message["content"])

    def scores(self, answer: Answer) -> list[tuple[float, bool]]:
        whole = answer.prompt + answer.tokens
        entries = self.ask("/v1/completions", prompt=whole, max_tokens=1, prompt_logprobs=1)[
            "prompt_logprobs"
        ]
        pairs = zip(entries, whole, strict=True)
        found = [entry[str(token)] for entry, token in pairs if entry]  # the first token has none
        return [(entry["logprob"], entry["rank"] == 1) for entry in found[len(answer.prompt) - 1 :]]


@contextlib.contextmanager
def vllm(command: list[str], model: str, log: Path) -> Iterator[Server]:
    """A server of vLLM, started by `command`, in float32 on loopback."""
    assert command[:2] == ["vllm", "serve"]
    port = free_port()
    here = f"--dtype float32 --host 127.0.0.1 --port {port} --max-model-len 512".split()
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    program = str(Path(sys.executable).with_name("vllm"))
    with log.open("w") as out:
        process = subprocess.Popen(
            [program, *command[1:], *here, "--enforce-eager"],
            stdout=out,
            stderr=out,
            env=environment,
        )
    try:
        address = f"http://127.0.0.1:{port}"

        def healthy() -> bool:
            assert process.poll() is None, log.read_text()[-3000:]
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{address}/health", timeout=5),
            ):
                return True
            return False

        until(healthy, 1800, pause=1)
        yield Server(address, model)
    finally:
        process.terminate()
        process.wait(60)


def agrees(
    engine: "Server | LlamaCpp",
    answers: list[Answer],
    run: Served,
    within: float = EXACT,
    untied: float = 0.5,
) -> None:
    """Compare an engine with transformers; more than a share `untied` of the answers must tell them apart."""
    worst = [max(answer.differences(engine.scores(answer), within)) for answer in answers]
    clear = served.same_answers(answers, engine.told, run.chats, within)
    print(
        f"log-probabilities within {max(worst):.1e}; {clear} of {len(answers)} answers without a tie"
    )
    assert max(worst) < within
    assert clear > untied * len(answers)


@VLLM
def test_vllm_serves_the_adapter_by_the_command_of_its_card(
    run: Served, adapter: list[Answer], tmp_path: Path
) -> None:
    card = (Path(run.folder.adapter) / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("    vllm serve ")]
    command = shlex.split(
        line.replace("PATH_OF_THE_BASE", str(run.base)).replace("THIS_FOLDER", run.folder.adapter)
    )
    with vllm(command, "tuned", tmp_path / "log") as server:
        agrees(server, adapter, run)


@VLLM
def test_vllm_serves_the_merged_model(run: Served, merged: list[Answer], tmp_path: Path) -> None:
    with vllm(["vllm", "serve", run.folder.merged], run.folder.merged, tmp_path / "log") as server:
        agrees(server, merged, run)


# llama.cpp.


class LlamaCpp:
    def __init__(self, file: Path) -> None:
        from llama_cpp import Llama

        # Keys and values in float32 (type 0), as in transformers; the default is float16.
        self.model = Llama(str(file), n_ctx=512, logits_all=True, type_k=0, type_v=0, verbose=False)

    def told(self, chat: served.Chat) -> str:
        messages: Any = chat
        found: Any = self.model.create_chat_completion(
            messages, temperature=0, max_tokens=served.LENGTH
        )
        return str(found["choices"][0]["message"]["content"])

    def scores(self, answer: Answer) -> list[tuple[float, bool]]:
        self.model.reset()
        self.model.eval(answer.prompt + answer.tokens)
        first, last = len(answer.prompt) - 1, len(answer.prompt) + len(answer.tokens) - 1
        logprobs = torch.tensor(self.model.scores[first:last]).log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        return list(zip(chosen.tolist(), (chosen >= logprobs.amax(-1)).tolist(), strict=True))


@LLAMA_CPP
def test_llama_cpp_answers_with_the_file_in_float32(run: Served, merged: list[Answer]) -> None:
    agrees(LlamaCpp(run.gguf), merged, run)


@LLAMA_CPP
@pytest.mark.parametrize(
    ("precision", "within", "untied"),
    # Of q8_0 6 of 20 answers were told apart: in the others a token leads by less than the bound.
    [("f32", EXACT, 0.5), ("q8_0", 0.4, 0.2)],
)
def test_llama_cpp_answers_with_the_folder_for_ollama_of_a_finished_run(
    run: Served,
    merged: list[Answer],
    tmp_path: Path,
    precision: str,
    within: float,
    untied: float,
) -> None:
    folder = tmp_path / "tickets"
    words = ["export", run.config.folder(), "--to", folder, "--form", "ollama"]
    done = ran(
        [sys.executable, "-m", "olora_ray", *words, "--quantize", precision], cwd=project.ROOT
    )
    print(done.stdout.splitlines()[-1])
    engine = LlamaCpp(folder / "model.gguf")
    agrees(engine, merged, run, within, untied)
    # Ollama itself is not here; what it sends for these chats are the tokens that transformers makes.
    template = re.search(r'^TEMPLATE """(.*?)"""$', (folder / "Modelfile").read_text(), re.M | re.S)
    assert template
    for chat, answer in zip(run.chats, merged, strict=True):
        text = as_go_does(template[1], [(turn["role"], turn["content"]) for turn in chat[:-1]])
        assert engine.model.tokenize(text.encode(), special=True) == answer.prompt


@LLAMA_CPP
def test_llama_cpp_makes_the_tokens_of_the_training(run: Served) -> None:
    from llama_cpp import Llama

    tokenizer = AutoTokenizer.from_pretrained(run.folder.merged)
    model = Llama(str(run.gguf), vocab_only=True, verbose=False)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in run.chats]
    for text in [*texts, "  1234 5.67\n\n\tI'LL don't   naïve 東京 🦙 <|im_end|>\r\n x "]:
        assert (
            model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids
        )
