"""The Deployment, without replicas: those have an owner of their own."""

from __future__ import annotations

from pagedserve_operator.desired.facts import Facts
from pagedserve_operator.desired.head import head
from pagedserve_operator.desired.pods import pod_template
from pagedserve_operator.desired.rollout import rollout_annotation, strategy
from pagedserve_operator.desired.timing import progress_deadline_seconds
from pagedserve_operator.names import ANNOTATION_INPUTS, ANNOTATION_ROLLOUT, ANNOTATION_TUNING, selector_labels
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.tuning import Tuning, inputs_hash


def deployment(service: InferenceService, tuning: Tuning, facts: Facts) -> Json:
    """The Deployment of the engines; its annotations keep what was decided once."""
    template = pod_template(service, tuning, facts)
    annotations = {
        ANNOTATION_TUNING: tuning.to_json(),
        ANNOTATION_INPUTS: inputs_hash(service),
        ANNOTATION_ROLLOUT: rollout_annotation(template, facts.surge),
    }
    return {
        **head(service, "Deployment", annotations=annotations),
        "spec": {
            "selector": {"matchLabels": selector_labels(service.key.name)},
            "strategy": strategy(facts.surge),
            "progressDeadlineSeconds": progress_deadline_seconds(tuning.weights_mib, service.spec.lifecycle),
            "revisionHistoryLimit": 3,
            "template": template,
        },
    }
