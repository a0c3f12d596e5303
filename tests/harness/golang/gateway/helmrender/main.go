// Command helmrender prints what `helm install --namespace NAMESPACE NAME CHART --values VALUES...` would apply, and fails
// where Helm would: it is Helm's own loader, schema check and template engine without a cluster.
// usage: helmrender CHART NAME NAMESPACE [VALUES.yaml ...]
package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
)

func main() {
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4:]); err != nil {
		fmt.Fprintln(os.Stderr, "helmrender:", err)
		os.Exit(1)
	}
}

func run(path, name, namespace string, files []string) error {
	chart, err := loader.Load(path)
	if err != nil {
		return err
	}
	given := map[string]any{}
	for _, file := range files {
		more, err := chartutil.ReadValuesFile(file)
		if err != nil {
			return err
		}
		given = chartutil.CoalesceTables(more, given)
	}
	options := chartutil.ReleaseOptions{Name: name, Namespace: namespace, IsInstall: true}
	values, err := chartutil.ToRenderValues(chart, given, options, chartutil.DefaultCapabilities)
	if err != nil {
		return err
	}
	rendered, err := engine.Engine{Strict: true}.Render(chart, values)
	if err != nil {
		return err
	}
	for _, crd := range chart.CRDObjects() {
		fmt.Printf("---\n# Source: %s\n%s\n", crd.Filename, crd.File.Data)
	}
	for _, file := range slices.Sorted(maps.Keys(rendered)) {
		if strings.HasSuffix(file, ".txt") || strings.TrimSpace(rendered[file]) == "" {
			continue
		}
		fmt.Printf("---\n# Source: %s\n%s\n", file, rendered[file])
	}
	return nil
}
