"""From a bundle to something smaller and faster that answers alike: exports, engines, fewer bits."""
