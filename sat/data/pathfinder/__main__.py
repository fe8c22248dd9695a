"""``python -m sat.data.pathfinder --size 128 --count 1000 --out DIR``: draws pictures into a folder."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from rich.progress import Progress

from sat.data.pathfinder.contours import SETTINGS, Drawn, draw, settings_of


def main(argv: list[str] | None = None) -> int:
    """Write ``imgs/<part>/*.png`` and ``metadata/<part>.npy``, as they were released and ``--data.path`` reads them."""
    parser = argparse.ArgumentParser(
        prog="python -m sat.data.pathfinder",
        description="Draw pictures of Pathfinder into a folder that --data.path of the data set pathfinder reads.",
        allow_abbrev=False,
    )
    sizes = ", ".join(map(str, SETTINGS))
    parser.add_argument("--size", type=int, required=True, help=f"edge of the pictures in pixels: {sizes}")
    parser.add_argument("--count", type=int, required=True, help="how many pictures; half of them have the label 1")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--seed", type=int, default=0, help="decides which pictures (default: 0)")
    parser.add_argument("--contour_length", type=int, help="paddles of each of the two contours")
    parser.add_argument("--num_distractors", type=int, help="short contours that distract, as many as fit")
    args = parser.parse_args(argv)
    partial: Path | None = None
    try:
        settings = settings_of(args.size, args.contour_length, args.num_distractors)
        if args.count < 1 or args.seed < 0:
            raise ValueError(
                f"count must be at least 1 and seed at least 0, got {args.count} and {args.seed}; correct them"
            )
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f"{args.out} is no empty folder; choose another --out")
        # Beside the folder until all of it is there: half of one would be read as a whole one.
        out = args.out.resolve()
        partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
        with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("drawing Pathfinder", total=args.count)

            def take(start: int, part: Drawn) -> None:
                folder = partial / "imgs" / str(start)
                for each in (folder, partial / "metadata"):
                    each.mkdir(parents=True, exist_ok=True)
                lines = []
                for number, (picture, label) in enumerate(zip(part.pictures, part.labels, strict=True)):
                    Image.fromarray(picture).save(folder / f"sample_{number}.png")
                    lines.append(
                        f"imgs/{start} sample_{number}.png {number} {label} {settings.continuity} "
                        f"{settings.contour_length} {settings.distractor_length} {settings.paddle_length} "
                        f"{settings.paddle_thickness}\n"
                    )
                (partial / "metadata" / f"{start}.npy").write_text("".join(lines), encoding="utf-8")
                progress.advance(bar, len(part.labels))

            draw(settings, args.count, args.seed, take)
        if out.exists():
            out.rmdir()  # it is empty
        partial.rename(out)
    except KeyboardInterrupt:
        print("sat.data.pathfinder: interrupted; nothing was kept", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"sat.data.pathfinder: {error}", file=sys.stderr)
        return 2
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"{args.count} pictures of {args.size} x {args.size} pixels lie in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
