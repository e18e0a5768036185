"""Pictures of what was found: overlays, errors against the truth, how a box was refined, pixel representations.

Pictures are uint8 RGB arrays (H, W, 3). Small images are enlarged, so that lines do not hide objects. Coordinates are
half-open: a box's line runs inside it, on its first and last pixels.
"""

from rdsnet.results.matching import match_truth
from rdsnet.visualize.errors import comparison, draw_errors
from rdsnet.visualize.overlay import COLOURS, CROWD, PALETTE, distinct_colours, draw_objects, draw_truth
from rdsnet.visualize.refinement import explain_refinement
from rdsnet.visualize.representations import draw_representations
from rdsnet.visualize.sheet import captioned, contact_sheet

__all__ = [
    "COLOURS",
    "CROWD",
    "PALETTE",
    "captioned",
    "comparison",
    "contact_sheet",
    "distinct_colours",
    "draw_errors",
    "draw_objects",
    "draw_representations",
    "draw_truth",
    "explain_refinement",
    "match_truth",
]
