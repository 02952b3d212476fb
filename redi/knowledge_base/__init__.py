"""The knowledge base on disk: writing, reading, verification, and the tables derived from it.

Sharded safetensors and JSON only; the manifest is written last, and nothing is ever unpickled.
"""

from redi.knowledge_base.config import Config
from redi.knowledge_base.derived import Derived
from redi.knowledge_base.fingerprint import Fingerprint, weight_hash
from redi.knowledge_base.merge import Merged, merge
from redi.knowledge_base.reader import KnowledgeBase
from redi.knowledge_base.repair import Dropped, drop_damaged
from redi.knowledge_base.verification import Problem, VerifyReport, verify
from redi.knowledge_base.writer import Refusal, Writer

__all__ = [
    "Config",
    "Derived",
    "Dropped",
    "Fingerprint",
    "KnowledgeBase",
    "Merged",
    "Problem",
    "Refusal",
    "VerifyReport",
    "Writer",
    "drop_damaged",
    "merge",
    "verify",
    "weight_hash",
]
