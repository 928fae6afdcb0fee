"""Command line for scripts and bug reports: `python -m hunyuan3 draw --model FOLDER --prompt TEXT -o out.png`."""

import argparse
import sys
import time
from pathlib import Path

from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from .errors import Hunyuan3Error, RequestError
from .generate.noise import NOISE_SOURCES
from .pipeline import Hunyuan3
from .quant.policy import FORMATS


def draw(args: argparse.Namespace) -> None:
    """Draws pictures from a prompt and writes them as PNG files, the settings used among their text chunks."""
    if args.output.suffix.lower() != ".png":
        raise RequestError(f"--output is {args.output}; it must end in .png.")
    if args.tile_size and args.tile_size < 32:
        raise RequestError(f"--tile-size is {args.tile_size}; it must be at least 32 pixels, or 0 for whole.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(desc="load", unit="B", unit_scale=True) as bar:
        model = Hunyuan3.load(
            args.model,
            variant=args.variant,
            device=args.device,
            dtype=args.dtype,
            format=args.format,
            progress=lambda _stage, done, total: _move(bar, done, total),
        )
    conditioning = model.conditioning(
        args.prompt,
        width=args.width,
        height=args.height,
        system_prompt="custom" if args.custom_system_prompt else args.system_prompt,
        custom_system_prompt=args.custom_system_prompt,
        trace=args.trace,
    )
    run = model.sample(
        conditioning,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        shift=args.shift,
        batch_size=args.batch_size,
        noise=args.noise,
    )
    started = time.perf_counter()
    for _step in tqdm(run, desc="draw", total=run.settings.steps, unit="step"):
        pass
    used = run.settings
    print(
        f"{model.folder.variant} {model.options.dtype} on {model.options.device}, MoE {model.options.moe_backend}: "
        f"{used.steps} steps, guidance {used.guidance}, shift {used.shift}, seed {used.seed}, "
        f"{time.perf_counter() - started:.1f} s"
    )
    for index, picture in enumerate(model.pictures(run.latents, tile_size=args.tile_size or None)):
        path = args.output if used.batch_size == 1 else args.output.with_stem(f"{args.output.stem}_{index}")
        text = PngInfo()
        text.add_text("hunyuan3", f"{conditioning.prompt}\n{used}\n{model.folder.path.name}")
        picture.save(path, pnginfo=text)
        print(path)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hunyuan3", description="HunyuanImage-3.0 without ComfyUI.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("draw", help="draw pictures from a prompt").add_argument
    add("--model", type=Path, required=True, help="checkpoint folder")
    add("--prompt", required=True)
    add("-o", "--output", type=Path, default=Path("out.png"), help="PNG file to write (default: out.png)")
    add("--seed", type=int, default=0)
    add("--width", type=int, default=0, help="multiple of 16 (default: the checkpoint's base size)")
    add("--height", type=int, default=0, help="multiple of 16 (default: the checkpoint's base size)")
    add("--steps", type=int, default=0, help="0: the checkpoint's own default")
    add("--guidance", type=float, default=0.0, help="0: the checkpoint's own default")
    add("--shift", type=float, default=0.0, help="0: the checkpoint's own default")
    add("--batch-size", type=int, default=1)
    add("--noise", choices=NOISE_SOURCES, default="comfy")
    add("--system-prompt", default="auto", help="auto, None, dynamic, en_vanilla, en_recaption, ..., en_unified")
    add("--custom-system-prompt", default="", help="your own system prompt")
    add("--trace", default="", help="thinking or rewritten prompt to draw from")
    add("--variant", default="auto", help="auto, base, instruct or distil")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", help="auto, bfloat16 or float32")
    add(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        help="how the large matrices are stored (default: as in FOLDER)",
    )
    add("--tile-size", type=int, default=0, help="decode in tiles of so many pixels (default: whole)")
    args = parser.parse_args(argv)
    try:
        draw(args)
    except (Hunyuan3Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _move(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


if __name__ == "__main__":
    sys.exit(main())
