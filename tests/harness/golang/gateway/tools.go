//go:build tools

// Package tools keeps in go.mod what is built out of other modules.
package tools

import (
	_ "github.com/envoyproxy/gateway/cmd/egctl"
	_ "github.com/envoyproxy/gateway/cmd/envoy-gateway"
	_ "sigs.k8s.io/kustomize/kustomize/v5"
)
