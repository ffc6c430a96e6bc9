"""Print each requirement of the package and of its tests at the lower bound that it states.

python .ci/lower_bounds.py >lower.txt && pip install -r lower.txt
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
    name, bound = re.fullmatch(r"([\w-]+)>=([\w.]+)(?:,<[\w.]+)?", requirement).groups()
    print(f"{name}=={bound}")
