"""What runs this package in a real ComfyUI: testbed (set-up), comfy_server (a server to talk to), demo, test."""
