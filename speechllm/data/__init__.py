"""Manifests, recorded sets and synthetic speech."""
