"""Upload the model of a finished run, or a registered version, to the Hugging
Face hub. Starts no Ray.

    olora-ray push RUN|NAME@ALIAS ORG/NAME [--form adapter|merged] [--public]
        [--dry-run]

RUN         name of a finished run in ./runs, or its folder
NAME@ALIAS  a registered model and its alias, or NAME@VERSION: its files are
            verified as whenever a version is loaded
ORG/NAME    the repository; a new one is private, an old one stays as it is
--form      default: merged, or adapter for a run with export.merged: false
--public    make a new repository public
--dry-run   print the files and their sizes, and send nothing

The token is HF_TOKEN or that of `hf auth login`. Read the model card
(README.md) before you publish it.
"""

from olora_ray.common.errors import UserError
from olora_ray.config import command_line
from olora_ray.config.tables import FORMS
from olora_ray.evaluation.export import given, sizes_in


def main(argv: list[str]) -> None:
    arguments = command_line.parse(
        argv, usage=__doc__ or "", flags=["--public", "--dry-run"], options=["--form"]
    )
    names = [word for word in arguments.words if "=" not in word]
    if len(names) != 2:
        raise UserError("usage: olora-ray push RUN|NAME@ALIAS ORG/NAME; see --help")
    name, repo = names
    form = arguments.options.get("--form")
    if form not in (None, *FORMS):
        raise UserError(f"argument --form: {form} is none of {', '.join(FORMS)}")
    from olora_ray.pipeline import publish

    publish.check_name(repo, "argument ORG/NAME")
    with given(name, arguments.changes()) as found:
        form = form or found.form
        folder = found.adapter if form == "adapter" else found.merged
        if folder is None:
            raise UserError(
                f"argument --form: {found.about} has no files of the form {form}; it has {found.form}"
            )
        private = "--public" not in arguments.flags
        if "--dry-run" in arguments.flags:
            sizes = sizes_in(folder)
            for file, size in sizes.items():
                print(f"{size:>14,}  {file}")
            visible = "private" if private else "public"
            print(
                f"{sum(sizes.values()):>14,}  bytes of {found.about} as {form}, to {repo} ({visible} if it is new);"
                " nothing was sent"
            )
            return
        publish.check_hub(repo, "argument ORG/NAME")
        url = publish.upload(repo, folder, found.about, f"argument ORG/NAME: {repo}", private)
    print(f"{found.about} as {form}: {url}")
