"""Serving: engines that follow the registry."""
