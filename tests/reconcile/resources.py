"""The quickstart and samples of Arks' users, told in our own words: the same kinds, fields and names."""

QUICKSTART = """
apiVersion: arks.ai/v1
kind: ArksModel
metadata: {name: qwen-7b}
spec:
  model: Qwen/Qwen2.5-7B-Instruct-1M
  source: {huggingface: {}}
  storage:
    pvc:
      name: qwen-7b
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: local-path
        resources: {requests: {storage: 2Gi}}
---
apiVersion: arks.ai/v1
kind: ArksApplication
metadata: {name: app-qwen}
spec:
  replicas: 1
  size: 2
  tensorParallelSize: 2
  runtime: vllm
  model: {name: qwen-7b}
  instanceSpec:
    resources:
      limits: {nvidia.com/gpu: "1"}
      requests: {nvidia.com/gpu: "1"}
---
apiVersion: arks.ai/v1
kind: ArksEndpoint
metadata: {name: qwen-7b}
spec:
  defaultWeight: 5
  gatewayRef: {name: arks-eg, namespace: GATEWAYS}
  matchConfigs:
    - path: {type: PathPrefix, value: /v1/completions}
    - path: {type: PathPrefix, value: /v1/chat/completions}
---
apiVersion: arks.ai/v1
kind: ArksQuota
metadata: {name: basic-quota}
spec:
  quotas:
    - {type: prompt, value: 100000}
    - {type: response, value: 500000}
    - {type: total, value: 600000}
---
apiVersion: arks.ai/v1
kind: ArksToken
metadata: {name: example-token}
spec:
  token: sk-test123456
  qos:
    - arksEndpoint: {name: qwen-7b}
      rateLimits:
        - {type: rpm, value: 5}
        - {type: tpm, value: 40000}
        - {type: rpd, value: 100}
        - {type: tpd, value: 1000000}
      quota: {name: basic-quota}
"""

MODEL, APPLICATION, ENDPOINT, QUOTA, TOKEN = QUICKSTART.split("---")

STORED_MODEL = """
apiVersion: arks.ai/v1
kind: ArksModel
metadata: {name: qwen-7b}
spec:
  model: Qwen/Qwen2.5-7B-Instruct-1M
  storage:
    pvc:
      spec:
        accessModes: [ReadWriteOnce]
        resources: {requests: {storage: 2Gi}}
"""

SINGLE = """
apiVersion: arks.ai/v1
kind: ArksApplication
metadata: {name: app-qwen}
spec:
  replicas: 1
  runtime: vllm
  model: {name: qwen-7b}
  instanceSpec: {resources: {limits: {nvidia.com/gpu: "1"}}}
"""

PAIR = """
apiVersion: arks.ai/v1
kind: ArksDisaggregatedApplication
metadata: {name: pd}
spec:
  runtime: sglang
  model: {name: qwen-7b}
  router: {int32: 9000}
  prefill: {replicas: 1, instanceSpec: {resources: {limits: {nvidia.com/gpu: "1"}}}}
  decode: {replicas: 2, instanceSpec: {resources: {limits: {nvidia.com/gpu: "1"}}}}
"""

GATEWAY = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: arks-eg}
spec:
  gatewayClassName: arks-eg
  listeners: [{name: http, port: 80, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}]
"""
