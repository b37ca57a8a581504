{{/* The part of arkor-ray.validate that is about groups and their pods. */}}

{{- define "arkor-ray.validateGroups" -}}
{{- $groups := include "arkor-ray.groups" . | fromJsonArray -}}
{{- if not $groups -}}
{{- include "arkor-ray.problem" "workerGroups: every group has maxReplicas 0, and the head takes no work: nothing could run" -}}
{{- end -}}
{{- range $groups -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- include "arkor-ray.problem" (printf "workerGroups.%s: minReplicas %d is more than maxReplicas %d" .name (int .minReplicas) (int .maxReplicas)) -}}
{{- else if and (not $.Values.autoscaling.enabled) (lt (int .minReplicas) (int .maxReplicas)) -}}
{{- include "arkor-ray.problem" (printf "workerGroups.%s: with autoscaling.enabled=false a group keeps the size that it begins with: give minReplicas and maxReplicas the same number, not %d and %d" .name (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.validateRoles" -}}
{{- $groups := include "arkor-ray.groups" . | fromJsonArray -}}
{{- if and .Values.nodeRoles $groups -}}
{{- $roles := list -}}
{{- range $groups -}}
{{- $roles = append $roles .role -}}
{{- if not .role -}}
{{- include "arkor-ray.problem" (printf "workerGroups.%s: nodeRoles=true and the group has no role, so that nothing would run there; give it one (control-plane, training or serving), or set nodeRoles=false" .name) -}}
{{- end -}}
{{- end -}}
{{- range $role := list "control-plane" "training" "serving" -}}
{{- if not (has $role $roles) -}}
{{- include "arkor-ray.problem" (printf "workerGroups: nodeRoles=true and no group with role %s has pods, so that nothing of it could run; give a group that role, or set nodeRoles=false" $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* With more than one replica each has a pod to itself, or the loss of a pod could be that of the API. */}}
{{- define "arkor-ray.validateApi" -}}
{{- $pods := 0 -}}
{{- range include "arkor-ray.apiGroups" . | fromJsonArray -}}
{{- $pods = add $pods (int .minReplicas) -}}
{{- end -}}
{{- if gt (int .Values.api.replicas) (max 1 $pods) -}}
{{- include "arkor-ray.problem" (printf "api.replicas: each of the %d has a pod to itself, and just %d %s always there (minReplicas of the groups%s); lower api.replicas or raise minReplicas" (int .Values.api.replicas) (int $pods) (ternary "is" "are" (eq (int $pods) 1)) (ternary " with role control-plane" "" .Values.nodeRoles)) -}}
{{- end -}}
{{- end }}

{{/* How many GPUs a worker or a replica asks for is decided by how many the cluster has at that moment. */}}
{{- define "arkor-ray.validateGpus" -}}
{{- $minimum := 0 -}}
{{- $maximum := 0 -}}
{{- range include "arkor-ray.groups" . | fromJsonArray -}}
{{- $minimum = add $minimum (mul (int .minReplicas) (int .gpus)) -}}
{{- $maximum = add $maximum (mul (int .maxReplicas) (int .gpus)) -}}
{{- end -}}
{{- if and (gt $maximum 0) (eq $minimum 0) -}}
{{- include "arkor-ray.problem" (printf "workerGroups: there may be %d GPUs but none needs to be (minReplicas): while there is none, jobs train and models answer on CPUs and never ask for one; set minReplicas of a group with GPUs" $maximum) -}}
{{- end -}}
{{- if and (gt $maximum 1) (eq $minimum 1) -}}
{{- include "arkor-ray.problem" (printf "workerGroups: there may be %d GPUs but only one needs to be (minReplicas): while there is just one, training and serving share it (0.6 and 0.4) and never ask for another; have at least two, or set maxReplicas so that there is one for ever" $maximum) -}}
{{- end -}}
{{- end }}

{{/* Each pod as it would be made: what Kubernetes refuses comes after the migration, and from within the operator. */}}
{{- define "arkor-ray.validatePods" -}}
{{- include "arkor-ray.validateEnv" (dict "path" "extraEnv" "env" .Values.extraEnv) -}}
{{- range include "arkor-ray.pods" . | fromJsonArray -}}
{{- $path := ternary "head" (printf "workerGroups.%s" .name) (eq .name "head") -}}
{{- include "arkor-ray.validateEnv" (dict "path" (printf "%s.extraEnv" $path) "env" .extraEnv) -}}
{{- $resources := .resources | default dict -}}
{{- if not (and ($resources.requests | default dict).cpu ($resources.limits | default dict).memory) -}}
{{- include "arkor-ray.problem" (printf "%s.resources: give requests.cpu and limits.memory; Ray counts by them what a pod has room for" $path) -}}
{{- end -}}
{{- range $kind, $amounts := $resources -}}
{{- range $resource, $_ := $amounts -}}
{{- if or (eq $resource $.Values.gpuResource) (regexMatch "gpu$|^nvidia\\.com/mig-" $resource) -}}
{{- include "arkor-ray.problem" (printf "%s.resources.%s: %s is not given here; %s" $path $kind $resource (ternary "the head takes no work" (printf "say how many by %s.gpus, and which by gpuResource" $path) (eq $path "head"))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $pod := (include "arkor-ray.podTemplate" (dict "root" $ "spec" . "name" .name "container" "ray") | fromYaml).spec -}}
{{- $volumes := list -}}
{{- range $pod.volumes -}}
{{- if has .name $volumes -}}
{{- include "arkor-ray.problem" (printf "%s.extraVolumes: there is a volume %s already; choose another name" $path .name) -}}
{{- end -}}
{{- $volumes = append $volumes .name -}}
{{- end -}}
{{- $mounted := list -}}
{{- range (first $pod.containers).volumeMounts -}}
{{- if has .mountPath $mounted -}}
{{- include "arkor-ray.problem" (printf "%s.extraVolumeMounts: a volume is mounted at %s already; choose another path" $path .mountPath) -}}
{{- end -}}
{{- if not (has .name $volumes) -}}
{{- include "arkor-ray.problem" (printf "%s.extraVolumeMounts: there is no volume %s; name it in extraVolumes" $path .name) -}}
{{- end -}}
{{- $mounted = append $mounted .mountPath -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* dict path, env. What parts of the service, or several pods, must agree on is not for a list of variables. */}}
{{- define "arkor-ray.validateEnv" -}}
{{- range .env -}}
{{- if regexMatch "^(ARKOR_RAY_.*|RAY_AUTH_.*|REDIS_.*|RAY_REDIS_ADDRESS|AWS_ACCESS_KEY_ID|AWS_SECRET_ACCESS_KEY|AWS_DEFAULT_REGION|HOME|USER|LOGNAME)$" .name -}}
{{- include "arkor-ray.problem" (printf "%s: %s is set by the chart; give it by the value it belongs to (settings, database, storage, rayAuth, gcsFaultTolerance, podSecurity)" $.path .name) -}}
{{- end -}}
{{- end -}}
{{- end }}
