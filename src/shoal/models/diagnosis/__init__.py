"""What is wrong with a checkpoint, said from its config, index and headers alone; no tensor is read."""

from __future__ import annotations

from shoal.models.diagnosis.diagnose import diagnose
from shoal.models.diagnosis.finding import Diagnosis, Finding
from shoal.models.diagnosis.metadata import CheckpointMetadata, read_metadata

__all__ = ["CheckpointMetadata", "Diagnosis", "Finding", "diagnose", "read_metadata"]
