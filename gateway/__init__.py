"""The gateway process: owns every WebSocket, the functions and the subscriptions."""
