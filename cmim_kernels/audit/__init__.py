"""Is this model undistillable? Knockoff students under many attacks, against the LS student."""

from .attacks import Attack, register_attack, registered_attacks
from .data import AuditData, load_audit_data
from .render import plot_audit, to_markdown
from .report import AuditReport
from .run import audit
from .students import StudentTraining, mlp
from .tuning import tune_training

__all__ = [
    "Attack",
    "AuditData",
    "AuditReport",
    "StudentTraining",
    "audit",
    "load_audit_data",
    "mlp",
    "plot_audit",
    "register_attack",
    "registered_attacks",
    "to_markdown",
    "tune_training",
]
