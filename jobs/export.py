"""Takes an adapter out: merged into its base model, or as the PEFT folder it is; into a folder, onto the Hub, or both.

ray job submit --working-dir jobs -- python export.py --adapter /data/arkor/adapters/triage-final --merge --output /data/triage
ray job submit --working-dir jobs --runtime-env-json '{"env_vars": {"HF_TOKEN": "…"}}' -- \\
    python export.py --adapter /data/arkor/adapters/triage-final --push-to-hub owner/triage
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from arkor_ray.errors import ArkorError, InvalidRequestError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="a PEFT folder, also in s3://…, or a job's output")
    parser.add_argument("--model", help="the base model, where it is not where the adapter says")
    parser.add_argument("--merge", action="store_true", help="one model out of base and adapter")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="of the merged weights")
    parser.add_argument("--output", help="an absolute directory that is not there yet")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="a repository without files; token in HF_TOKEN")
    parser.add_argument("--public", action="store_true", help="the repository, if it is made here")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except ArkorError as error:
        print(f"export: {error.message}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    from arkor_ray.demo.base_model import base_reference
    from arkor_ray.storage.adapter_files import read_adapter
    from arkor_ray.storage.locations import fetch_base
    from arkor_ray.training import hub
    from arkor_ray.training.merge import QLORA_CAVEAT, copy_adapter, merge_adapter

    if not (args.output or args.push_to_hub):
        raise InvalidRequestError("give --output, --push-to-hub or both")
    if args.output and not Path(args.output).is_absolute():
        raise InvalidRequestError(f"--output: {args.output!r} must be an absolute directory", param="--output")
    if args.push_to_hub:
        hub.check(args.push_to_hub, os.environ.get("HF_TOKEN"))  # before the work
    adapter = read_adapter(args.adapter)
    base = base_reference(args.model) if args.model else adapter.base_model
    notes = [QLORA_CAVEAT] if args.merge and adapter.base_precision == "nf4" else []
    for note in notes:
        print(note, flush=True)
    with tempfile.TemporaryDirectory(prefix="arkor-export-") as temporary:
        folder = Path(args.output or f"{temporary}/out")
        if args.merge:
            merge_adapter(adapter, fetch_base(base), folder, args.dtype)
        else:
            copy_adapter(adapter, folder)
        if args.output:
            print(f"{'the merged model' if args.merge else 'the adapter'} is in {folder}", flush=True)
        if args.push_to_hub:
            token, private = os.environ.get("HF_TOKEN"), not args.public
            url = hub.push_folder(
                folder, args.push_to_hub, base_model=base, merged=args.merge, token=token, private=private, notes=notes
            )
            print(f"and at {url}" if args.output else f"it is at {url}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
