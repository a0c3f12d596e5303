//go:build tools

// Package tools keeps in go.mod what is built out of other modules.
package tools

import _ "github.com/versity/versitygw/cmd/versitygw"
