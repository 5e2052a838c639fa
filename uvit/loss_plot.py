"""A plot of a training's loss."""

from PIL import Image

from ..nodes.ui import pictures
from ..nodes.ui.plots import COLOURS, Axes, round_up

SIZE = 720, 360
BOX = 70, 40, 690, 300
POINTS = 200


def loss_plot(losses: list[float]) -> Image.Image:
    """The loss over the steps, averaged in at most ``POINTS`` intervals of equal length."""
    count = len(losses)
    length = -(-count // POINTS)
    points = []
    for start in range(0, count, length):
        interval = losses[start : start + length]
        points.append((min(start + length / 2, count), sum(interval) / len(interval)))
    top = round_up(max(loss for _, loss in points))
    picture = Image.new("RGB", SIZE, pictures.PAPER)
    axes = Axes(picture, BOX, (0, count), (0.0, top))
    steps = [count * i // 4 for i in range(5)]
    axes.frame("step", "loss", [0, top / 2, top], {float(step): str(step) for step in steps})
    axes.line(points, COLOURS[1])
    return picture
