"""Heat over grey: absolute, thresholded, aligned."""

from __future__ import annotations

import torch

from dicom_xai.encode import color

GREY = torch.full((40, 60), 0.5)
OUTLINE = (0, 220, 255)


def painted(heat: torch.Tensor, threshold: float = 0.35, display: torch.Tensor = GREY):
    canvas = torch.empty(*display.shape, 3, dtype=torch.uint8)
    color.composite(display[None], [layer(heat, threshold)], [canvas])
    return canvas


def layer(heat: torch.Tensor, threshold: float = 0.35) -> color.Layer:
    return color.layer(heat[None], [0], threshold, OUTLINE, 0)


def square(height: float = 1.0) -> torch.Tensor:
    heat = torch.zeros(40, 60)
    heat[10:20, 30:50] = height
    return heat


def test_without_heat_the_image_is_grey_as_windowed():
    display = torch.linspace(-0.5, 1.5, 40)[:, None].expand(40, 60).contiguous()
    canvas = painted(torch.zeros(40, 60), display=display)
    expected = (display.clamp(0, 1) * 255).round().to(torch.uint8)
    assert all(torch.equal(canvas[..., c], expected) for c in range(3))


def test_heat_below_the_threshold_draws_nothing():
    assert layer(square(0.34)).frames == ()


def test_exactly_the_pixels_at_or_above_the_threshold_are_drawn():
    canvas = painted(square(0.35))
    colored = (canvas[..., 0] != canvas[..., 1]) | (canvas[..., 1] != canvas[..., 2])
    assert torch.equal(colored, square() > 0)


def test_the_outline_is_the_findings_and_the_inside_the_heats():
    canvas = painted(square(1.0))
    assert tuple(canvas[10, 30].tolist()) == OUTLINE
    assert tuple(canvas[19, 49].tolist()) == OUTLINE
    red, green, blue = canvas[15, 40].tolist()
    assert red > green > blue


def test_color_depends_on_heat_alone_and_not_on_the_images_maximum():
    low = painted(square(0.5))
    both = square(0.5)
    both[30:38, 5:15] = 1.0
    assert torch.equal(low[10:20, 30:50], painted(both)[10:20, 30:50])


def test_heat_beyond_full_scale_is_drawn_as_full_scale():
    assert torch.equal(painted(square(7.0)), painted(square(1.0)))


def test_not_a_number_is_not_heat():
    assert layer(square(float("nan"))).frames == ()


def test_the_strongest_of_two_findings_gives_the_color():
    weak, strong = square(0.4), square(0.9)
    canvas = torch.empty(40, 60, 3, dtype=torch.uint8)
    color.composite(GREY[None], [layer(strong), layer(weak)], [canvas])
    assert torch.equal(canvas, painted(strong))


def test_the_scale_starts_dark_red_and_ends_yellow():
    table = color.heat_table()
    assert table[0].tolist() == [110, 0, 10]
    assert table[255].tolist() == [255, 240, 80]
    assert bool((table[:, 0].diff() >= 0).all())
    assert torch.equal(color.blend_table()[:256, 0], torch.arange(256, dtype=torch.uint8))
