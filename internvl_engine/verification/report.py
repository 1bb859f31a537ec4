"""What `verify` found: single checks, and all of them together."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Finding:
    """One check: its name, whether it passed, and what was seen. passed None is a remark."""

    check: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "    "}[self.passed]
        return f"{mark} {self.check}: {self.detail}"


@dataclass
class Report:
    """What `verify` found."""

    path: str
    findings: list[Finding] = field(default_factory=list)
    tensors: int = 0
    parameters: int = 0
    sha256: dict[str, str] = field(default_factory=dict)
    example: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(finding.passed is not False for finding in self.findings)

    def add(self, check: str, passed: bool | None, detail: str) -> None:
        """Records one check."""
        self.findings.append(Finding(check, passed, detail))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": self.path,
            "ok": self.ok,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "sha256": self.sha256,
            "example": self.example,
            "findings": [vars(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        verdict = "is complete and sound" if self.ok else "is NOT sound"
        return "\n".join([*map(str, self.findings), f"{self.path} {verdict}"])
