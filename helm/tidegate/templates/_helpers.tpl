{{- define "tidegate.labels" -}}
app.kubernetes.io/name: tidegate
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* What never changes in the life of a release, since selectors cannot. */ -}}
{{- define "tidegate.gateway.selector" -}}
app.kubernetes.io/name: tidegate
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: gateway
{{- end }}
{{- define "tidegate.agent.selector" -}}
app.kubernetes.io/name: tidegate
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: agent
{{- end }}

{{- define "tidegate.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end }}
{{- end }}
{{- end }}

{{- define "tidegate.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Containers that only speak to the API server. */ -}}
{{- define "tidegate.unprivileged" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
runAsGroup: 65532
runAsNonRoot: true
runAsUser: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "tidegate.gateway.config" -}}
{{- $config := deepCopy .Values.gateway.config }}
{{- $_ := set $config "exemptNamespaces" (append $config.exemptNamespaces .Release.Namespace | uniq | sortAlpha) }}
{{- $identity := dict "given" (or .Values.identity.given .Values.identity.certManager.enabled) }}
{{- range list "secret" "trust" "audience" "certificateSeconds" "authoritySeconds" "overlapSeconds" }}
{{- $value := get $.Values.identity . }}
{{- $_ := set $identity . (kindIs "string" $value | ternary $value (int64 $value)) }}
{{- end }}
{{- $kubernetes := dict "namespace" .Release.Namespace "service" "tidegate-gateway" "clusterDns" .Values.clusterDns "identity" $identity }}
{{- if .Values.agent.startupTaint }}{{ $_ := set $kubernetes "startupTaint" true }}{{ end }}
{{- $_ := set $config "kubernetes" $kubernetes }}
{{- if .Values.api.enabled }}
{{- $_ := set $config "api" (printf "[::]:%d" (int .Values.api.port)) }}
{{- end }}
{{- $_ := set $config "control" "[::]:7443" }}
{{- $_ := set $config "admin" "[::]:9090" }}
{{- $_ := set $config "socket" "/run/tidegate/plug/agent.sock" }}
{{- $_ := set $config "pins" "/sys/fs/bpf/gateway" }}
{{- $_ := set $config "journal" "/var/lib/tidegate" }}
{{- $_ := set $config "tunnelPort" .Values.tunnelPort }}
{{- toYaml $config }}
{{- end }}

{{- define "tidegate.agent.config" -}}
{{- $config := deepCopy .Values.agent.config }}
{{- $domain := first .Values.gateway.config.cluster.suffixes }}
{{- $discover := dict "service" (printf "tidegate-gateway.%s.svc.%s" .Release.Namespace $domain) "port" 7443 }}
{{- $_ := set $discover "entrance" (printf "tidegate-entrance.%s.svc.%s" .Release.Namespace $domain) }}
{{- $_ := set $config "discover" $discover }}
{{- $_ := set $config "join" (dict "token" "/var/run/secrets/tidegate/token" "ca" "/etc/tidegate-trust/ca.crt") }}
{{- $_ := set $config "socket" "/run/tidegate/plug/agent.sock" }}
{{- $_ := set $config "pins" "/sys/fs/bpf/tidegate" }}
{{- if .Values.cni.enabled }}
{{- $cni := dict "folder" "/run/tidegate/cni" "standing" "/var/lib/tidegate/cni.json" "binDir" .Values.cni.binDir "confDir" .Values.cni.confDir }}
{{- $_ := set $config "cni" $cni }}
{{- end }}
{{- $_ := set $config "admin" (printf "%s:%d" (ternary "[::]" "127.0.0.1" .Values.metrics.agents) (int .Values.agent.adminPort)) }}
{{- $_ := set $config "tunnelPort" .Values.tunnelPort }}
{{- $_ := set $config "drainSeconds" .Values.gateway.config.drainSeconds }}
{{- toYaml $config }}
{{- end }}

{{- /* Contradictions that a schema cannot see, and what else is in the cluster. Each message names the value. */ -}}
{{- define "tidegate.validate" -}}
{{- $dns := .Values.gateway.config.dns }}
{{- if gt (int64 $dns.ttlMinSeconds) (int64 $dns.ttlMaxSeconds) }}
{{- fail (printf "gateway.config.dns.ttlMinSeconds (%d) is above gateway.config.dns.ttlMaxSeconds (%d)" (int64 $dns.ttlMinSeconds) (int64 $dns.ttlMaxSeconds)) }}
{{- end }}
{{- $ports := .Values.gateway.config.cluster.nodePorts }}
{{- if gt (int64 $ports.first) (int64 $ports.last) }}
{{- fail (printf "gateway.config.cluster.nodePorts.first (%d) is above gateway.config.cluster.nodePorts.last (%d)" (int64 $ports.first) (int64 $ports.last)) }}
{{- end }}
{{- range .Values.agent.config.overlayPorts }}
{{- if eq (int64 .) (int64 $.Values.tunnelPort) }}
{{- fail (printf "tunnelPort (%d) is one of agent.config.overlayPorts: the tunnel needs a port of its own" (int64 .)) }}
{{- end }}
{{- end }}
{{- with .Values.agent.config.mark }}
{{- $value := int64 .value }}
{{- $mask := int64 .mask }}
{{- $bits := 0 }}
{{- $outside := false }}
{{- range until 32 }}
{{- $bits = add $bits (mod $mask 2) }}
{{- $outside = or $outside (and (eq (mod $value 2) 1) (eq (mod $mask 2) 0)) }}
{{- $value = div $value 2 }}
{{- $mask = div $mask 2 }}
{{- end }}
{{- if $outside }}
{{- fail (printf "agent.config.mark.value (%d) has bits outside of agent.config.mark.mask (%d)" (int64 .value) (int64 .mask)) }}
{{- end }}
{{- if lt $bits 2 }}
{{- fail (printf "agent.config.mark.mask (%d) needs at least two bits: there are two marks" (int64 .mask)) }}
{{- end }}
{{- end }}
{{- with .Values.identity }}
{{- if and .given .certManager.enabled }}
{{- fail "identity.given and identity.certManager.enabled: the Secret is either somebody else's or cert-manager's" }}
{{- end }}
{{- if and .certManager.enabled (not .certManager.issuerRef.name) }}
{{- fail "identity.certManager.issuerRef.name is needed where identity.certManager.enabled is true: who signs the authority" }}
{{- end }}
{{- $least := mul 3 (add (int64 .certificateSeconds) (int64 .overlapSeconds)) }}
{{- if and (not (or .given .certManager.enabled)) (lt (int64 .authoritySeconds) $least) }}
{{- fail (printf "identity.authoritySeconds (%d) is less than three times identity.certificateSeconds and identity.overlapSeconds together (%d)" (int64 .authoritySeconds) $least) }}
{{- end }}
{{- end }}
{{- range $key, $_ := .Values.gateway.podLabels }}
{{- if hasPrefix "app.kubernetes.io/" $key }}
{{- fail (printf "gateway.podLabels: %s is the chart's own" $key) }}
{{- end }}
{{- end }}
{{- range $key, $_ := .Values.agent.podLabels }}
{{- if hasPrefix "app.kubernetes.io/" $key }}
{{- fail (printf "agent.podLabels: %s is the chart's own" $key) }}
{{- end }}
{{- end }}
{{- $annotations := (((lookup "rbac.authorization.k8s.io/v1" "ClusterRole" "" "tidegate-gateway").metadata).annotations) | default dict }}
{{- $name := get $annotations "meta.helm.sh/release-name" }}
{{- $namespace := get $annotations "meta.helm.sh/release-namespace" }}
{{- if and $name (or (ne $name .Release.Name) (ne $namespace .Release.Namespace)) }}
{{- fail (printf "Tidegate is already in this cluster, as the release %s in the namespace %s. A node's kernel has room for one: upgrade that release, or uninstall it first" $name $namespace) }}
{{- end }}
{{- end }}
