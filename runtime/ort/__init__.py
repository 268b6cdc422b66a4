"""ONNX Runtime: its providers, devices, sessions and small graphs."""

import os

# Recent wheels of ONNX Runtime give the machine an id in the user's cache and report its sessions to Microsoft, unless
# told not to before they are imported. Whoever wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
