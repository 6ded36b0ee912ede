"""What every picture is made with: colors, figures, images with a map laid over them, cards with words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from m3ae_fast._files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.ImageDraw import ImageDraw

# Sizes in pixels, colors as #rrggbb
SIDE, GAP, MARGIN, LINE, COLUMNS = 192, 10, 28, 21, 2
LOW, TALL = LINE + 4, 2 * LINE + 6  # lines of words, without and with guesses below them
PAPER, CARD, INK, FAINT = "#f4f5f7", "#ffffff", "#1f2430", "#8a91a0"
GUESSES = "gray words were masked, the model's guess is below them: green where it is right"
NEXT_LINE = ("\n", "", False)  # as a word of a card
MASKED_WORD, RIGHT, WRONG = "#e4e7ee", "#178a4c", "#c8452f"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. Not pyplot's: no display, no state shared with the caller."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_png(path: Path) -> None:
    """ValueError: its name is not that of a PNG."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {path}")


def save_figure(figure: Figure, path: Path) -> None:
    """As a PNG, whole or not at all."""
    check_png(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def heat(image: np.ndarray, map: Tensor) -> np.ndarray:
    """[H, W, 3] uint8: the image in gray with a map [H, W] laid over it, dark blue where it is lowest, yellow
    where highest."""
    import matplotlib

    share = ((map - map.min()) / (map.max() - map.min()).clamp(min=1e-12)).numpy()
    colors = 255 * matplotlib.colormaps["plasma"](share)[..., :3]
    return np.uint8(0.4 * image.mean(2, keepdims=True) + 0.6 * colors)


def mark(pen: ImageDraw, lines: Sequence[Sequence[float]], color: str, width: int) -> None:
    """Lines (x0, y0, x1, y1, ...) edged with white and dark, so that they show on any image."""
    for fill, edge in ((INK, 4), ("white", 2), (color, 0)):
        for line in lines:
            pen.line(line, fill=fill, width=width + edge, joint="curve")


def visible(image: np.ndarray) -> np.ndarray:
    """[..., C] uint8 -> [..., 3]: the first three channels as red, green and blue; of one or two, the first as gray."""
    return image[..., :3] if image.shape[-1] >= 3 else image[..., [0, 0, 0]]


def note_of_channels(channels: int) -> str:
    """What a picture says of the channels that `visible` leaves out; "" where there are none."""
    if channels in (1, 3):
        return ""
    return f"channel{'s 1, 2 and 3' if channels > 3 else ' 1'} of {channels} {'are' if channels > 3 else 'is'} shown"


class Card(NamedTuple):
    """What a sample is shown by."""

    panels: list[np.ndarray]  # [H, W, 3] uint8
    words: list[tuple[str, str, bool]]  # (word, guess, whether it was masked)
    label: str = ""  # in its upper right corner


def plain_words(text: str) -> list[tuple[str, str, bool]]:
    """The words of a card of which none was masked."""
    return [(word, "", False) for word in text.split()]


class Cards:
    """Lays cards out in columns; `image` is the picture.

    Args:
        cards: one a sample. titles: of the panels. note: at the foot, beside what the colors of guesses mean.
        guesses: what is said there of the colors of guesses.
    """

    def __init__(self, cards: list[Card], titles: tuple[str, ...], note: str = "", guesses: str = GUESSES):
        import matplotlib
        from PIL import Image, ImageDraw, ImageFont

        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # a font that is there on every machine
        self._font = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 15)
        self._bold = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), 13)
        self._small = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 13)
        self._titles = titles
        columns = min(COLUMNS, len(cards))
        inner = len(titles) * (SIDE + GAP) - GAP
        width = inner + 2 * GAP
        placed = [card._replace(words=self._lay_out(card.words, inner)) for card in cards]
        heights = [self._height(*card) for card in placed]
        rows = [max(heights[i : i + columns]) for i in range(0, len(cards), columns)]
        guessed = any(masked for card in cards for _, _, masked in card.words)
        notes = "; ".join(each for each in (guesses if guessed else "", note) if each)
        wide = max(columns * (width + GAP) - GAP, math.ceil(self._small.getlength(notes)))
        size = (wide + 2 * MARGIN, sum(rows) + (len(rows) - 1) * GAP + 2 * MARGIN + LINE)
        self.image = Image.new("RGB", size, PAPER)
        self._pen = ImageDraw.Draw(self.image)
        self._pen.text((MARGIN, size[1] - MARGIN - 8), notes, font=self._small, fill=FAINT)
        for i, card in enumerate(placed):
            row, column = divmod(i, columns)
            x, y = MARGIN + column * (width + GAP), MARGIN + sum(rows[:row]) + row * GAP
            self._pen.rounded_rectangle((x, y, x + width - 1, y + rows[row] - 1), 8, fill=CARD)
            self._card(x + GAP, y + GAP, *card)
            self._pen.text((x + width - GAP, y + GAP - 3), card.label, font=self._small, fill=FAINT, anchor="ra")

    def save(self, path: Path) -> None:
        check_png(path)
        with replacing(path) as temporary:
            self.image.save(temporary, format="PNG")

    def _height(self, panels, words, label) -> int:
        height = LINE + _shown(panels[0])[1] if panels else LINE if label else 0
        text = max((top + (TALL if guess else LOW) for _, _, top, _, guess in words), default=0)
        return height + (GAP if panels and text else 0) + text + 2 * GAP

    def _lay_out(self, text, width: int) -> list[tuple[int, int, int, str, tuple[str, bool] | None]]:
        """(x, width, y, word, None or (guess, whether it is right)) of each word, wrapped."""
        placed, x, line = [], 0, 0
        for word, guess, masked in text:
            if word == NEXT_LINE[0]:
                x, line = 0, line + 1
                continue
            joined = word.startswith("##") and word != "##"  # a piece that continues a word
            shown = word[2:] if joined else word
            wide = self._font.getlength(shown)
            if masked:
                wide = max(wide, self._font.getlength(guess)) + 8
            wide = round(wide)
            x -= 5 if joined and x and not masked else 0
            if x and x + wide > width:
                x, line = 0, line + 1
            placed.append((x, wide, line, shown, (guess, guess == word) if masked else None))
            x += wide + 6
        guessed = {at for _, _, at, _, guess in placed if guess}
        tops = [0, *itertools.accumulate(TALL if at in guessed else LOW for at in range(line))]
        return [(x, wide, tops[at], word, guess) for x, wide, at, word, guess in placed]

    def _card(self, x: int, y: int, panels, words, label) -> None:
        from PIL import Image

        for i, (panel, title) in enumerate(zip(panels, self._titles, strict=bool(panels))):
            left = x + i * (SIDE + GAP)
            self._pen.text((left, y - 3), title, font=self._bold, fill=FAINT)
            enlarged = max(panel.shape[:2]) < SIDE
            resample = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
            self.image.paste(Image.fromarray(panel).resize(_shown(panel), resample), (left, y + LINE))
        y += LINE + _shown(panels[0])[1] + GAP if panels else LINE if label else 0
        for left, wide, top, word, guess in words:
            left, top = x + left, y + top
            middle = left + wide / 2
            if guess is not None:
                self._pen.rounded_rectangle((left, top, left + wide, top + LINE), 5, fill=MASKED_WORD)
                color = RIGHT if guess[1] else WRONG
                self._pen.text((middle, top + LINE + 3), guess[0], font=self._font, fill=color, anchor="ma")
            self._pen.text((middle, top + 2), word, font=self._font, fill=INK, anchor="ma")


def _shown(panel: np.ndarray) -> tuple[int, int]:
    """(width, height) at which a panel is drawn: its longer side is SIDE."""
    height, width = panel.shape[:2]
    return round(SIDE * width / max(height, width)), round(SIDE * height / max(height, width))
