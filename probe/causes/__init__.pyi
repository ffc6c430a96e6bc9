from ._edge_sets import as_sets as as_sets
from ._greedy import answers_under as answers_under
from ._interventions import Outcomes as Outcomes
from ._interventions import intervene as intervene
from ._plans import Do as Do
