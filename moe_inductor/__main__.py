"""``python -m moe_inductor demo | info | patterns | explain``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import moe_inductor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moe_inductor", description=moe_inductor.__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="unmodified transformers MoE models: fused or not, accuracy against fp64, time",
    )
    demo.add_argument("--model", choices=("mixtral", "qwen3", "dsv3", "all"), default="all")
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    demo.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")

    commands.add_parser("info", help="versions and hardware, to paste into a bug report")
    commands.add_parser("patterns", help="the spellings that are recognised")

    explain = commands.add_parser("explain", help="what would be fused in your model, and why not")
    explain.add_argument(
        "factory",
        metavar="SCRIPT.py:FUNCTION",
        help="FUNCTION() returns (model, args) or (model, args, kwargs)",
    )

    args = parser.parse_args(argv)
    if args.command == "demo":
        from moe_inductor import demo as demo_module

        return demo_module.run(args.model, args.device, args.dtype)
    if args.command == "info":
        return _info()
    if args.command == "patterns":
        return _patterns()
    return _explain(args.factory)


def _info() -> int:
    import torch

    rows = {"moe_inductor": f"{moe_inductor.__version__} in {moe_inductor.__path__[0]}"}
    for name in ("torch", "triton", "transformers", "sympy"):
        try:
            rows[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows[name] = "not installed"
    rows["python"] = f"{platform.python_version()} on {platform.platform()}"
    rows["cpu"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    for index in gpus:
        major, minor = torch.cuda.get_device_capability(index)
        rows[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    if not gpus:
        rows["cuda"] = f"no device (torch built for {torch.version.cuda or 'CPU only'})"
    rows["backend"] = _backend_state()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _backend_state() -> str:
    import torch

    try:
        importlib.import_module("moe_inductor.backend")
    except Exception as error:
        return f"does not import: {type(error).__name__}: {error}"
    if "moe_inductor" not in torch.compiler.list_backends():
        return "imports, but torch does not list it: is the package installed (pip install -e .)?"
    return "ok"


def _patterns() -> int:
    from moe_inductor.match.api import ExpertsSpelling, discover

    spellings = discover()
    width = max((len(spelling.name) for spelling in spellings), default=0)
    for spelling in spellings:
        kind = "experts" if isinstance(spelling, ExpertsSpelling) else "router"
        print(f"{kind:<8} {spelling.name:<{width}}  {spelling.source}")
    print(
        f"{len(spellings)} spellings in {importlib.import_module('moe_inductor.patterns').__path__[0]}"
    )
    return 0


def _explain(factory: str) -> int:
    script, _, function = factory.rpartition(":")
    if not script:
        print(f"expected SCRIPT.py:FUNCTION, got {factory!r}", file=sys.stderr)
        return 2
    spec = importlib.util.spec_from_file_location("__moe_inductor_script__", script)
    if spec is None or spec.loader is None or not Path(script).is_file():
        print(f"{script!r} is not a Python file", file=sys.stderr)
        return 2
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    model, args, *rest = getattr(module, function)()
    kwargs: dict[str, Any] = rest[0] if rest else {}
    explanation = moe_inductor.explain(model, *args, **kwargs)
    return 0 if explanation.blocks and all(block.fused for block in explanation.blocks) else 1


if __name__ == "__main__":
    sys.exit(main())
