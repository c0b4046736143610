"""From the results of an evaluation to one self-contained HTML page.

    write_report(results, "report.html")    results as `halfbyte.report.schema.Results` describes them

The page loads nothing: pictures are data URIs, charts are inline SVG, and its own policy forbids the network. Needs jinja2 and
matplotlib: pip install 'halfbyte[report]'.
"""

from halfbyte.report.page import write_report
from halfbyte.report.schema import Results, check_results, load_results, save_results

__all__ = ["Results", "check_results", "load_results", "save_results", "write_report"]
